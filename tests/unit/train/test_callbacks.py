"""When callbacks act: saving, stopping, validating, recording."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.platform import select
from nemotron3_megatron.telemetry.jsonlines import JsonLines, read_evals, read_steps
from nemotron3_megatron.telemetry.records import TagLoss
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.callbacks.checkpointing import Checkpointing
from nemotron3_megatron.train.callbacks.preemption import SIGNALS, Preemption
from nemotron3_megatron.train.callbacks.recording import Recording, Validation
from nemotron3_megatron.train.loss import Losses
from nemotron3_megatron.train.optimizer import Update
from nemotron3_megatron.train.step import StepResult

APPLIED = Update(True, 1.5)
TAGS = {"code": TagLoss(4.5, 100)}


def tiny(*overrides: str) -> Run:
    recipe, origins = compose(["recipe=tiny", "max_steps=9", *overrides])
    return resolve(recipe, 2, origins)


def drive(
    callback: Callback, run: Run, first: int, last: int, stop: Stop | None = None, update: Update = APPLIED
) -> None:
    """Steps ``first + 1`` to ``last`` of one start, in the loop's order of hooks."""
    callback.started(progress := Progress(first))
    for step in range(first + 1, last + 1):
        progress.step = step
        event = StepEvent(
            step=step,
            tokens=run.tokens_at(step),
            stage=run.stages[0],
            lr=1e-3,
            result=StepResult((4.0 + step, 5.0, 6.0), update, TAGS),
            step_time_s=0.5,
            last=step == run.total_steps,
        )
        callback.step_done(event)
    callback.finished(progress, stop)


@pytest.mark.parametrize(
    ("overrides", "first", "last", "stop", "saved"),
    [
        (("checkpoint.every='3 steps'",), 0, 9, None, [3, 6, 9]),
        (("checkpoint.every='4 steps'",), 0, 9, None, [4, 8, 9]),
        (("checkpoint.every='4 steps'", "checkpoint.save_at_end=false"), 0, 9, None, [4, 8]),
        (("checkpoint.every=null",), 0, 9, None, [9]),
        (("checkpoint.every=null", "checkpoint.save_at_end=false"), 0, 9, None, []),
        (("checkpoint.every='4 steps'",), 0, 6, Stop.PREEMPTED, [4, 6]),
        (("checkpoint.every='4 steps'", "checkpoint.save_at_end=false"), 0, 6, Stop.PREEMPTED, [4, 6]),
        (("checkpoint.every='3 steps'",), 0, 6, Stop.PREEMPTED, [3, 6]),
        (("checkpoint.every='3 steps'",), 6, 9, None, [9]),
        (("checkpoint.every='3 steps'",), 9, 9, None, []),
    ],
)
def test_checkpointing(overrides: tuple[str, ...], first: int, last: int, stop: Stop | None, saved: list[int]) -> None:
    """Every so many steps, at the end, when stopped; no step twice, nor the one that was resumed from."""
    run = tiny(*overrides)
    steps: list[int] = []
    drive(Checkpointing(run, steps.append), run, first, last, stop)
    assert steps == saved


@pytest.mark.parametrize(
    ("every", "first", "validated"),
    [("'3 steps'", 0, [3, 6, 9]), ("'4 steps'", 0, [4, 8, 9]), ("'4 steps'", 4, [8, 9]), ("null", 0, [])],
)
def test_validation(every: str, first: int, validated: list[int], tmp_path: Path) -> None:
    run = tiny(f"telemetry.eval_every={every}")
    writer = JsonLines(tmp_path, None)
    drive(Validation(run, lambda event: Losses((event.step / 2, 7.0, 8.0), TAGS), [writer]), run, first, 9)
    writer.close()
    records = read_evals(tmp_path)
    assert [record.step for record in records] == validated
    assert [record.validation_loss for record in records] == [step / 2 for step in validated]
    assert all((record.mtp_losses, record.tags) == ((7.0, 8.0), TAGS) for record in records)


def test_validation_without_held_out_data(caplog: pytest.LogCaptureFixture) -> None:
    """Said once, and not an error: published recipes validate, one's own data may have nothing to validate on."""
    run = tiny("data=custom", "telemetry.eval_every='3 steps'")
    drive(Validation(run, lambda event: pytest.fail("evaluated nothing"), []), run, 0, 9)
    assert "data.validation is empty" in caplog.text


def test_every_rank_validates_and_only_writers_write() -> None:
    """Evaluation is a collective: it must run also where there is no writer."""
    run = tiny("telemetry.eval_every='3 steps'")
    evaluated: list[int] = []

    def evaluate(event: StepEvent) -> Losses:
        evaluated.append(event.step)
        return Losses((1.0,))

    drive(Validation(run, evaluate, []), run, 0, 9)
    assert evaluated == [3, 6, 9]


def test_recording(tmp_path: Path) -> None:
    run = tiny()
    drive(Recording(run, select("cpu"), [JsonLines(tmp_path, None)]), run, 0, 2)
    first, second = read_steps(tmp_path)
    assert (first.step, first.loss, first.mtp_losses, first.grad_norm) == (1, 5.0, (5.0, 6.0), 1.5)
    assert first.tags == second.tags == TAGS
    assert second.tokens == 2 * 16 * 256
    assert second.tokens_per_s == 16 * 256 / 0.5
    assert not second.skipped
    assert not second.skip_reason


def test_recording_a_refused_update(tmp_path: Path) -> None:
    run = tiny()
    refused = Update(False, float("nan"), tuple(f"layer{i}.weight" for i in range(7)))
    drive(Recording(run, select("cpu"), [JsonLines(tmp_path, None)]), run, 0, 1, update=refused)
    (record,) = read_steps(tmp_path)
    assert record.skipped
    assert record.skip_reason.startswith("non-finite gradients in layer0.weight, ")
    assert record.skip_reason.endswith("layer4.weight and 2 more")


@pytest.fixture
def world_of_one() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
@pytest.mark.usefixtures("world_of_one")
def test_preemption(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    preemption = Preemption(torch.device("cpu"))
    try:
        assert preemption.wants_stop(1) is None
        os.kill(os.getpid(), number)
        assert preemption.wants_stop(2) is Stop.PREEMPTED
        assert preemption.wants_stop(3) is Stop.PREEMPTED, "a request is not forgotten"
    finally:
        preemption.finished(Progress(2), Stop.PREEMPTED)
    assert signal.getsignal(number) == before
