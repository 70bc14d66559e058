"""A rank's own watch: where it is, a thread that ends it when it hangs or another rank failed, and its last words."""

from __future__ import annotations

import faulthandler
import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ResilienceConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.launch.exit_record import leave_record
from nemotron3_megatron.resilience.board import Board
from nemotron3_megatron.resilience.failure import Failure, Kind, is_waiting, kind_of

EXIT_FAILURE = 1
POLL_S = 1.0
"""Between two looks of the thread: one ``stat`` of a shared file."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a rank is, and since when (``time.monotonic``)."""

    phase: str
    step: int
    stage: str
    since: float


class Watch:
    """Keeps the place of the main thread; a second thread compares it with the limits."""

    def __init__(self, board: Board, limits_s: Mapping[str, float], *, poll_s: float = POLL_S) -> None:
        """Prepare.

        Args:
            board: of this rank.
            limits_s: longest time in each phase; one that is not named has no limit.
            poll_s: seconds between looks.
        """
        self._board = board
        self._limits = dict(limits_s)
        self._poll_s = poll_s
        self._place = Place("start", 0, "", time.monotonic())
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """The rank is done."""
        self._ended.set()

    def enter(self, phase: str, step: int, stage: str) -> None:
        """The main thread begins something else."""
        self._place = Place(phase, step, stage, time.monotonic())

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within it the phase is another; afterwards the earlier one, whose time begins anew.

        An exception leaves the phase as it is: the failure will name it.
        """
        before = self._place
        self._place = replace(before, phase=phase, since=time.monotonic())
        yield
        self._place = replace(before, since=time.monotonic())

    def fail(self, error: BaseException) -> NoReturn:
        """Report an exception and end the process."""
        kind = kind_of(error)
        if kind == "exception":
            leave_record(EXIT_FAILURE, error)
        words = traceback.format_exception_only(error)[-1].strip()
        stack = "".join(traceback.format_tb(error.__traceback__)[1:])
        self._leave(kind, " ".join(words.split()), stack)

    def _look(self) -> None:
        while not self._ended.wait(self._poll_s):
            place = self._place
            limit = self._limits.get(place.phase)
            late = limit is not None and time.monotonic() - place.since > limit
            if late or self._board.hanging():
                self._hang(limit if late else None)
            elif self._board.decided():
                self._quit()

    def _hang(self, limit_s: float | None) -> NoReturn:
        self._board.call_hang()
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        self._dump_all_threads()
        found = (
            f"no progress within {limit_s:g} s"
            if limit_s is not None
            else "stopped because another rank hangs or is gone"
        )
        waiting = is_waiting(frames)
        error = found + (", waiting for other ranks" if waiting else "")
        leave_record(EXIT_FAILURE, TimeoutError(error))
        self._leave("hang", error, "".join(traceback.format_list(frames)), waiting=waiting)

    def _dump_all_threads(self) -> None:
        self._board.stacks.mkdir(parents=True, exist_ok=True)
        path = self._board.stacks / f"rank_{self._board.rank:05d}.txt"
        with path.open("w", encoding="utf-8") as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.write("\n" + native_threads())

    def _leave(self, kind: Kind, error: str, stack: str, *, waiting: bool = False) -> NoReturn:
        if not self._leaving.acquire(blocking=False):
            time.sleep(3600)  # the other thread is at it, and ends the process
        place = self._place
        failure = Failure(
            kind=kind,
            rank=self._board.rank,
            host=socket.gethostname(),
            step=place.step,
            stage=place.stage,
            phase=place.phase,
            error=error,
            stack=stack[-20_000:],
            waiting=waiting,
            time_s=time.time(),
            world_size=self._board.world_size,
        )
        try:
            cause = self._board.report(failure)
        except OSError as problem:
            _log.error("the failure could not be recorded: %s", problem)
            cause = failure
        if cause is not None:
            sys.stderr.write(f"{cause.text()}  records: {self._board.folder}\n")
        self._quit()

    def _quit(self) -> NoReturn:
        """At once: an ordinary exit would wait for collectives that never end."""
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(EXIT_FAILURE)


def limits_of(options: ResilienceConfig) -> dict[str, float]:
    """The longest time in each phase, in seconds; the ``end`` tears down groups, which a slow save may hold up."""
    return {
        "start": options.start_timeout_s,
        "first step": options.first_step_timeout_s,
        "step": options.step_timeout_s,
        "save": options.save_timeout_s,
        "evaluation": options.evaluation_timeout_s,
        "end": options.save_timeout_s,
    }


@contextmanager
def watched(run: Run) -> Iterator[Watch]:
    """A watch over everything inside; an exception there is reported once for all ranks and ends this process.

    Raises:
        UserError: as it came; the caller shows it.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    watch = Watch(Board(run.run_dir, rank, world_size, os.environ), limits_of(run.resilience))
    if run.resilience.watchdog:
        watch.start()
    try:
        yield watch
    except UserError:
        watch.close()
        raise
    except Exception as error:
        watch.fail(error)
    watch.close()


def native_threads() -> str:
    """Name, state and kernel function of every thread of this process (Linux); empty elsewhere."""
    lines = []
    for task in sorted(Path("/proc/self/task").glob("*")):
        try:
            state = (task / "stat").read_text().rsplit(")", 1)[1].split()[0]
            name, at = (task / "comm").read_text().strip(), (task / "wchan").read_text().strip()
        except OSError:  # it has ended meanwhile
            continue
        lines.append(f"thread {task.name} {name}: state {state}, in {at or 'unknown'}\n")
    return "".join(lines)
