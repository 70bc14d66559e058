"""The console line: aligned, complete, and there exactly when it is due."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
from rich.console import Console as Terminal

from nemotron3_megatron.config import Run
from nemotron3_megatron.telemetry import EvalRecord, OperandRecord, StepRecord
from nemotron3_megatron.telemetry.console import Console, eval_line, step_line

Step = Callable[..., StepRecord]


def shown(run: Run, records: list[StepRecord], *, is_terminal: bool = False) -> list[str]:
    file = io.StringIO()
    colours = {"force_terminal": True, "color_system": "standard", "no_color": False} if is_terminal else {}
    terminal = Terminal(file=file, width=80, **colours)
    console = Console(run, terminal)
    for record in records:
        console.write(record)
    return file.getvalue().splitlines()


def test_the_line_holds_every_number(step: Step) -> None:
    line = step_line(step(120), 600, 192.0).plain
    assert line == ("step 120/600  20%  loss 3.2489  mtp 3.5489 3.8489  |g|  1.25  lr 1.00e-03  2.05k tok/s  eta 3m12s")


def test_a_sampled_step_names_the_operand_that_loses_most(
    run: Run, step: Step, operands: tuple[OperandRecord, ...]
) -> None:
    nan = dataclasses.replace(operands[0], flush_to_zero=math.nan)
    lines = shown(run, [step(1, precision=(nan, *operands)), step(10), step(11, precision=operands)])
    assert [line.split()[0] for line in lines] == ["step", "prec", "step"]  # the 11th is not due
    assert "flush to zero at most 30.0%  gradient of decoder.layers.2.mixer.in_proj in nvfp4" in lines[1]
    assert lines[1].index("flush") == lines[0].index("loss")


def test_columns_are_aligned_over_a_run(step: Step) -> None:
    lines = [step_line(step(number), 600, 1.0).plain for number in (1, 20, 300)]
    lines.append(step_line(step(600, grad_norm=12345.6, loss=math.nan, tokens_per_s=7.0), 600, None).plain)
    for word in ("loss", "mtp", "|g|", "lr", "tok/s", "eta"):
        assert len({line.index(word) for line in lines}) == 1, word


def test_evaluations_stand_in_the_columns_of_steps(step: Step, evaluation: Callable[[int], EvalRecord]) -> None:
    one, other = step_line(step(50), 600, 1.0).plain, eval_line(evaluation(50), 600).plain
    assert other.startswith("eval  50/600   8%  val  ")
    assert one.index("mtp") == other.index("mtp")


def test_due_are_the_first_the_last_and_every_tenth_step_and_refused_updates(run: Run, step: Step) -> None:
    run = dataclasses.replace(run, total_steps=25)
    refused = step(13, skipped=True, skip_reason="non-finite gradients in decoder.layers.0")
    records = [refused if number == 13 else step(number) for number in range(3, 26)]
    lines = shown(run, records)
    assert [int(line.split("/")[0].removeprefix("step ")) for line in lines] == [3, 10, 13, 20, 25]
    assert lines[2].endswith("update refused: non-finite gradients in decoder.layers.0")
    assert lines[-1].endswith("eta 0s")


def test_plain_in_a_file_coloured_on_a_terminal(run: Run, step: Step) -> None:
    assert "\x1b[" not in "".join(shown(run, [step(1)]))
    assert "\x1b[" in "".join(shown(run, [step(1)], is_terminal=True))


def test_a_narrow_file_does_not_break_the_line(run: Run, step: Step) -> None:
    assert len(shown(run, [step(1)])) == 1


def test_the_stage_is_named_when_there_are_several(run: Run, step: Step) -> None:
    (stage,) = run.stages
    several = dataclasses.replace(run, stages=(stage, dataclasses.replace(stage, name="other")))
    assert "  main  " in shown(several, [step(1)])[0]
    assert "  main  " not in shown(run, [step(1)])[0]


def test_the_eta_counts_tokens(run: Run, step: Step) -> None:
    # 2,048 tokens/s and 489 steps of 4,096 tokens: 2 s a step.
    (line,) = shown(run, [step(1)])
    minutes, seconds = divmod((run.total_steps - 1) * 2, 60)
    assert line.endswith(f"eta {minutes}m{seconds:02d}s")


def test_resuming_is_said(run: Run) -> None:
    file = io.StringIO()
    Console(run, Terminal(file=file, width=80)).resumed(98)
    assert file.getvalue() == f"resumed at step 98/{run.total_steps} (401k of 2.00M tokens)\n"


_TWO_STEPS = """
import dataclasses, sys
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.logs import start_logging
from nemotron3_megatron.telemetry import EvalRecord
from nemotron3_megatron.telemetry.console import Console
start_logging()
console = Console(resolve(compose(["recipe=tiny"])[0], 2))
for number in (1, 2):
    console.write_eval(EvalRecord(step=number, tokens=number, stage="main", validation_loss=3.0))
print("goes on", file=sys.stderr)
"""


@pytest.mark.parametrize("lost", ["its reader has gone", "its disk is full"])
def test_a_run_outlives_its_stdout(lost: str) -> None:
    """A pager that was left, a dead tee, a full disk: one warning, no exception, no status 120 at Python's end."""
    if lost == "its disk is full":
        stdout = os.open("/dev/full", os.O_WRONLY)
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-c", _TWO_STEPS], stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(stdout)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("stdout failed") == 1
    assert done.stderr.endswith("goes on\n")
