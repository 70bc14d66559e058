"""metrics.jsonl reads like the record of a run that was never interrupted."""

from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.telemetry import EvalRecord, OperandRecord, StepRecord
from nemotron3_megatron.telemetry.jsonlines import METRICS, VALIDATION, JsonLines, read_evals, read_steps

Step = Callable[..., StepRecord]
Evaluation = Callable[[int], EvalRecord]


def record(run_dir: Path, numbers: range, resumed: int | None, step: Step, evaluation: Evaluation) -> None:
    writer = JsonLines(run_dir, resumed)
    for number in numbers:
        writer.write(step(number))
        if number % 2 == 0:
            writer.write_eval(evaluation(number))
    writer.close()


def test_a_resumed_run_records_its_sampled_steps_once(
    tmp_path: Path, step: Step, operands: tuple[OperandRecord, ...]
) -> None:
    for numbers, resumed in ((range(1, 8), None), (range(5, 11), 4)):
        writer = JsonLines(tmp_path, resumed)
        for number in numbers:
            writer.write(step(number, precision=operands if number % 3 == 0 else ()))
        writer.close()
    found = read_steps(tmp_path)
    assert len((tmp_path / METRICS).read_text().splitlines()) == len(found) == 10
    assert [record.step for record in found if record.precision] == [3, 6, 9]
    assert all(record.precision in ((), operands) for record in found)


def test_a_resumed_run_leaves_the_files_of_an_undisturbed_one(
    tmp_path: Path, step: Step, evaluation: Evaluation
) -> None:
    record(tmp_path / "whole", range(1, 11), None, step, evaluation)
    record(tmp_path / "broken", range(1, 8), None, step, evaluation)
    for name in (METRICS, VALIDATION):
        with (tmp_path / "broken" / name).open("a") as file:
            file.write('{"step": 8, "tokens": 32')  # torn by kill -9
    record(tmp_path / "broken", range(5, 11), 4, step, evaluation)

    for name in (METRICS, VALIDATION):
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [found.step for found in read_steps(tmp_path / "broken")] == list(range(1, 11))
    assert [found.step for found in read_evals(tmp_path / "broken")] == [2, 4, 6, 8, 10]


@given(cut=st.integers(0, 2000), resumed=st.integers(0, 6))
def test_wherever_the_file_was_cut_the_complete_records_up_to_the_step_stay(
    tmp_path_factory: pytest.TempPathFactory, cut: int, resumed: int
) -> None:
    whole = [
        EvalRecord(step=n, tokens=n, stage="α", validation_loss=n / 3, mtp_losses=(n / 7,)).to_json()
        for n in range(1, 7)
    ]
    data = ("\n".join(whole) + "\n").encode()[:cut]
    complete = data.count(b"\n")
    run_dir = tmp_path_factory.mktemp("cut")
    (run_dir / VALIDATION).write_bytes(data)

    JsonLines.truncate_after(run_dir, resumed)

    assert (run_dir / VALIDATION).read_text().splitlines() == whole[: min(complete, resumed)]
    assert [path.name for path in run_dir.iterdir()] == [VALIDATION]  # no partial file stays


def test_a_line_cut_just_before_its_end_is_dropped_so_that_the_next_one_stays_whole(tmp_path: Path, step: Step) -> None:
    (tmp_path / METRICS).write_text(f"{step(1).to_json()}\n{step(2).to_json()}")
    writer = JsonLines(tmp_path, 2)
    writer.write(step(3))
    writer.close()
    assert [found.step for found in read_steps(tmp_path)] == [1, 3]


def test_a_killed_process_loses_no_record(tmp_path: Path) -> None:
    program = f"""
import os, signal
from pathlib import Path
from nemotron3_megatron.telemetry import EvalRecord
from nemotron3_megatron.telemetry.jsonlines import JsonLines
writer = JsonLines(Path({str(tmp_path)!r}), None)
for n in range(1, 4):
    writer.write_eval(EvalRecord(step=n, tokens=n, stage="a", validation_loss=1.0))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, env={**os.environ, "PYTHONPATH": os.getcwd()})
    assert done.returncode == -signal.SIGKILL
    assert [found.step for found in read_evals(tmp_path)] == [1, 2, 3]


def test_records_of_an_earlier_run_are_set_aside_not_deleted(
    tmp_path: Path, step: Step, evaluation: Evaluation, caplog: pytest.LogCaptureFixture
) -> None:
    for last in (4, 3, 2):
        record(tmp_path, range(1, last), None, step, evaluation)

    assert len(read_steps(tmp_path)) == 1
    assert len((tmp_path / "metrics.1.jsonl").read_text().splitlines()) == 3
    assert len((tmp_path / "metrics.2.jsonl").read_text().splitlines()) == 2
    assert "metrics.1.jsonl" in caplog.text


def test_of_a_step_recorded_twice_the_later_record_counts(tmp_path: Path, step: Step) -> None:
    writer = JsonLines(tmp_path, None)
    for loss in (1.0, 2.0):
        writer.write(step(1, loss=loss))
    writer.close()
    assert [found.loss for found in read_steps(tmp_path)] == [2.0]


def test_a_torn_line_is_reported(tmp_path: Path, step: Step, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / METRICS).write_text(step(1).to_json() + "\n" + step(2).to_json()[:-5])
    with caplog.at_level(logging.WARNING):
        assert len(read_steps(tmp_path)) == 1
    assert f"{METRICS}:2" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's device without space")
def test_a_full_disk_is_an_error_for_the_user(tmp_path: Path, step: Step) -> None:
    (tmp_path / METRICS).symlink_to("/dev/full")
    writer = JsonLines(tmp_path, None)
    with pytest.raises(UserError, match=os.strerror(errno.ENOSPC)):
        writer.write(step(1))


def test_a_directory_without_records_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=METRICS):
        read_steps(tmp_path)
    assert read_evals(tmp_path) == []
