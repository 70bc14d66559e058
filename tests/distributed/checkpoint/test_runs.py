"""The real ``train.py`` with ``checkpoint.async_save``: SIGTERM, a killed worker, a killed rank, a second job.

Every run ends, after whatever happened, with the very numbers of a run that saved in the usual way undisturbed.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
from e2e_start import STEPS, Start, checkpoints, ended, overrides, records

from nemotron3_megatron.checkpoint import manifest

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

ASYNC = "checkpoint.async_save=true"
BITWISE = ("step", "loss", "mtp_losses", "grad_norm", "lr")


@pytest.fixture(scope="module")
def expected(undisturbed: Path) -> list[dict[str, object]]:
    """Numbers of a run that waits for its checkpoints."""
    return _numbers(undisturbed)


def test_killed_worker(data: Path, tmp_path: Path, expected: list[dict[str, object]]) -> None:
    command = overrides(tmp_path, data, ASYNC, "checkpoint.keep_last=null")
    with Start(command) as start:
        worker = _when(lambda: _worker(start, rank=1) if "step_00000002" in checkpoints(tmp_path) else None)
        worker.kill()
        outcome = start.wait(400)
    assert outcome.codes == (0, 0), outcome.output
    assert "the checkpoint worker of rank 1 died by SIGKILL" in outcome.output
    assert "a checkpoint is lost with the worker that wrote it; saving step" in outcome.output
    assert _numbers(tmp_path) == expected
    assert checkpoints(tmp_path)[-1] == f"step_{STEPS:08d}"
    for path in (tmp_path / "checkpoints").iterdir():
        manifest.verify_contents(manifest.verify(path), path)


def test_killed_rank_and_a_second_job(data: Path, tmp_path: Path, expected: list[dict[str, object]]) -> None:
    command = overrides(tmp_path, data, ASYNC)
    with Start(command) as start:
        # The worker writes while training goes on.
        start.signal_when(lambda: ".step_00000004.partial" in checkpoints(tmp_path), 1, signal.SIGKILL, 400)
        killed = start.wait(400)
    assert killed.codes[1] == -signal.SIGKILL
    assert killed.codes[0] != 0
    assert "step_00000002" in checkpoints(tmp_path)

    with Start(command) as first:
        # It stands still while the other starts, or it might be done by then.
        first.signal_when(lambda: len(records(tmp_path)) >= 5, 0, signal.SIGSTOP, 400)
        second = ended(command)
        first.signal_when(lambda: True, 0, signal.SIGCONT)
        outcome = first.wait(400)
    assert second.codes == (2, 2), second.output
    assert "is running in it, and two would overwrite each other" in second.output
    assert outcome.codes == (0, 0), outcome.output
    assert "continuing from" in outcome.output
    assert _numbers(tmp_path) == expected
    assert not (tmp_path / "run.lock").exists()


def test_preempted_while_the_worker_writes(data: Path, tmp_path: Path, expected: list[dict[str, object]]) -> None:
    """Both checkpoints are finished, the one under way and that of the step boundary, and nothing is left behind."""
    command = overrides(tmp_path, data, ASYNC, "checkpoint.keep_last=null")
    with Start(command) as start:
        workers = [_when(partial(_worker, start, rank)) for rank in range(2)]
        start.signal_when(lambda: ".step_00000004.partial" in checkpoints(tmp_path), 1, signal.SIGTERM, 400)
        preempted = start.wait(400)
    assert preempted.codes == (75, 75), preempted.output
    assert "SIGTERM: saving at the next step boundary" in preempted.output
    last = len(records(tmp_path))
    assert 4 <= last < STEPS
    saved = sorted({2, 4, last})
    assert checkpoints(tmp_path) == [f"step_{step:08d}" for step in saved]
    for path in (tmp_path / "checkpoints").iterdir():
        manifest.verify_contents(manifest.verify(path), path)
    assert not any(worker.is_running() for worker in workers)
    assert not (tmp_path / "run.lock").exists()

    outcome = ended(command)
    assert outcome.codes == (0, 0), outcome.output
    assert f"continuing from {tmp_path}/checkpoints/step_{last:08d}" in outcome.output
    assert _numbers(tmp_path) == expected


def _numbers(run_dir: Path) -> list[dict[str, object]]:
    return [{key: record[key] for key in BITWISE} for record in records(run_dir)]


def _worker(start: Start, rank: int) -> psutil.Process | None:
    for child in psutil.Process(start._processes[rank].pid).children():
        with suppress(psutil.Error):  # ended meanwhile
            if "nemotron3_megatron.checkpoint.worker" in child.cmdline():
                return child
    return None


def _when[T](ready: Callable[[], T | None], timeout_s: float = 400) -> T:
    """The first true value of ``ready``."""
    deadline = time.monotonic() + timeout_s
    while not (value := ready()):
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return value
