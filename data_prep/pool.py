"""Shards over processes, with progress, and nothing lost when one fails."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from queue import Empty, SimpleQueue
from typing import Any

from data_prep.shard import ShardRecord, ShardTask, make_shard
from nemotron3_megatron.config.errors import UserError

_POLL_SECONDS = 0.2
_REPORT_BYTES = 1 << 18


def make_shards(tasks: Sequence[ShardTask], num_workers: int, advance: Callable[[int], None]) -> list[ShardRecord]:
    """Make every shard; with one worker in this process.

    Args:
        advance: called with the bytes of input used up since the last call.

    Raises:
        UserError: a shard's input cannot be read, or a worker died. Finished shards stay.
    """
    if not tasks:
        return []
    with _workers(min(num_workers, len(tasks))) as (executor, reports):
        futures = [executor.submit(_work, task, reports) for task in tasks]
        try:
            _follow(futures, reports, advance)
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process died",
                why="most often because memory ran out",
                nearest="fewer num_workers or smaller shard_bytes; run again, finished shards are kept",
            ) from error
        finally:
            executor.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


def _work(task: ShardTask, reports: Any) -> ShardRecord:
    """Make a shard and report its progress now and then."""
    unreported = 0

    def advance(count: int) -> None:
        nonlocal unreported
        unreported += count
        if unreported >= _REPORT_BYTES:
            reports.put(unreported)
            unreported = 0

    record = make_shard(task, advance)
    reports.put(unreported)
    return record


def _follow(futures: Sequence[Future[ShardRecord]], reports: Any, advance: Callable[[int], None]) -> None:
    pending = set(futures)
    while pending:
        done, pending = wait(pending, timeout=_POLL_SECONDS, return_when=FIRST_COMPLETED)
        for count in _drain(reports):
            advance(count)
        for future in done:
            future.result()


def _drain(reports: Any) -> Iterator[int]:
    while True:
        try:
            yield reports.get_nowait()
        except Empty:
            return


@contextmanager
def _workers(count: int) -> Iterator[tuple[Executor, Any]]:
    """An executor, and a queue that its workers can put to."""
    if count == 1:
        with ThreadPoolExecutor(1) as threads:
            yield threads, SimpleQueue()
        return
    # spawn, not fork: the progress bar and the tokenizer have threads, which do not survive a fork
    context = multiprocessing.get_context("spawn")
    with context.Manager() as shared, ProcessPoolExecutor(count, context, initializer=_one_thread) as processes:
        yield processes, shared.Queue()


def _one_thread() -> None:
    """Workers already share the cores among themselves."""
    os.environ.update(RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
