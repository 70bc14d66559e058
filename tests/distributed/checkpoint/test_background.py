"""Saving from a worker: the same checkpoints, and nothing lost when the worker is."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks

from nemotron3_megatron.checkpoint import staging
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError


def test_training_goes_on_and_the_checkpoint_does_not_change(tmp_path: Path) -> None:
    for report in run_ranks(same_as_blocking, 2, folder=str(tmp_path)):
        assert report == {
            "trained on": True,
            "outcome": "published",
            "as saved": True,
            "continues": True,
            "second": True,
        }


@pytest.mark.parametrize("moment", ["before", "while writing"])
def test_dead_worker(tmp_path: Path, moment: str) -> None:
    for report in run_ranks(worker_dies, 2, folder=str(tmp_path), moment=moment):
        assert report.pop("not before all are done", ["running"]) == ["running"]
        assert report == {"outcome": "lost", "left": ["step_00000001"], "next": "published", "newest": 3}


def test_stale_buffer_is_never_published(tmp_path: Path) -> None:
    (message,) = run_ranks(stale_buffer, 1, folder=str(tmp_path))
    assert "is not what was to be saved" in message
    assert "step_00000001 is intact" in message


def same_as_blocking(folder: str) -> dict[str, Any]:
    """Save step 2 in the background, train on at once, and resume from it: the same run as without a break."""
    from job import digest, job, load_newest, train

    report: dict[str, Any] = {}
    with job(ep=2, dtype="bf16") as trainer:
        store = CheckpointStore(Path(folder))
        store.saver.start_worker(trainer.chunks, trainer.optimizer)
        train(trainer, 0, 2)
        bits = digest(trainer)
        store.saver.begin(2, trainer.chunks, trainer.optimizer, {"step": 2})
        expected = train(trainer, 2, 4)
        report["trained on"] = digest(trainer) != bits
        report["outcome"] = store.saver.poll(wait=True)
        store.saver.begin(4, trainer.chunks, trainer.optimizer, {"step": 4})  # reuses plan and memory
        end = digest(trainer)
        store.saver.poll(wait=True)
        store.release()
    with job(ep=2, dtype="bf16") as trainer:
        store = CheckpointStore(Path(folder))
        store.load(Path(folder) / "checkpoints" / "step_00000002", trainer.chunks, trainer.optimizer)
        report["as saved"] = digest(trainer) == bits
        report["continues"] = train(trainer, 2, 4) == expected
        load_newest(trainer, Path(folder))
        report["second"] = digest(trainer) == end
    return report


def worker_dies(folder: str, moment: str) -> dict[str, Any]:
    """Rank 1's worker is killed; the save is lost, known to all, and the next one is whole."""
    import torch
    from job import job, load_newest

    rank = int(os.environ["RANK"])
    report: dict[str, Any] = {}
    with job(stack="M", mtp_depths=0) as trainer:
        store = CheckpointStore(Path(folder))
        store.save(1, trainer.chunks, trainer.optimizer, {"step": 1}, keep_last=None)
        store.saver.start_worker(trainer.chunks, trainer.optimizer)
        worker = store.saver._worker
        assert worker is not None
        if rank == 1 and moment == "before":
            _kill(worker.pid)
        if rank == 1 and moment == "while writing":
            os.kill(worker.pid, signal.SIGSTOP)
        store.saver.begin(2, trainer.chunks, trainer.optimizer, {"step": 2})
        if rank == 1 and moment == "while writing":
            report["not before all are done"] = _poll_for(store, 0.5)
            _kill(worker.pid)
        elif moment == "while writing":
            report["not before all are done"] = _poll_for(store, 0.5)
        report["outcome"] = store.saver.poll(wait=True)
        report["left"] = sorted(os.listdir(Path(folder) / "checkpoints"))
        torch.distributed.barrier()
        store.saver.begin(3, trainer.chunks, trainer.optimizer, {"step": 3})
        report["next"] = store.saver.poll(wait=True)
        report["newest"] = load_newest(trainer, Path(folder))["step"]
        store.release()
    return report


def _poll_for(store: CheckpointStore, seconds: float) -> list[str]:
    found = set()
    for _ in range(5):
        found.add(store.saver.poll(wait=False))
        time.sleep(seconds / 5)
    return sorted(found)


def stale_buffer(folder: str) -> str:
    """A worker that writes what it had written before: the known fault of asynchronous savers."""
    from job import job, train

    put = staging.Staging.put
    held: list[Any] = []

    def only_once(self: staging.Staging, data: Any) -> Any:
        if len(data) == 1 or not held:  # the letter always arrives
            places = put(self, data)
            held.append(places)
            return places
        return held[-2]

    with job(stack="M", mtp_depths=0) as trainer:
        store = CheckpointStore(Path(folder))
        store.saver.start_worker(trainer.chunks, trainer.optimizer)
        staging.Staging.put = only_once  # type: ignore[method-assign]
        try:
            store.saver.begin(1, trainer.chunks, trainer.optimizer, {"step": 1})
            store.saver.poll(wait=True)
            train(trainer, 0, 1)
            store.saver.begin(2, trainer.chunks, trainer.optimizer, {"step": 2})
            store.saver.poll(wait=True)
        except UserError as error:
            return str(error)
        finally:
            store.release()
    return "published"


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
