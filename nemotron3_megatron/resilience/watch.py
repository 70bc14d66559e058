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
from contextlib import contextmanager, suppress
from dataclasses import replace
from tempfile import TemporaryFile
from typing import NoReturn

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ResilienceConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.launch.exit_record import leave_record, without_secrets
from nemotron3_megatron.logs import to_stderr
from nemotron3_megatron.resilience.board import Board
from nemotron3_megatron.resilience.failure import Failure, Kind, attempt_name, is_waiting, kind_of
from nemotron3_megatron.resilience.place import Place
from nemotron3_megatron.resilience.sentry import NATIVE_S, Sentry

EXIT_FAILURE = 1
POLL_S = 1.0
"""Between two looks of the thread: one ``stat`` of a shared file."""

_log = logging.getLogger(__name__)


class Watch:
    """Keeps the place of the main thread; a second thread compares it with the limits; a process looks after both."""

    def __init__(
        self, board: Board, limits_s: Mapping[str, float], *, poll_s: float = POLL_S, native_s: float = NATIVE_S
    ) -> None:
        """Prepare.

        Args:
            board: of this rank.
            limits_s: longest time in each phase; one that is not named has no limit.
            poll_s: seconds between looks.
            native_s: longest time that native stacks may take.
        """
        self._board = board
        self._limits = dict(limits_s)
        self._poll_s, self._native_s = poll_s, native_s
        self._sentry: Sentry | None = None
        self._place = self._at("start", 0, "")
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        try:
            self._sentry = Sentry(self._board, self._poll_s, self._native_s)
        except OSError as error:
            _log.warning("no native stacks and no watch over native code: %s", error)
        self._thread.start()
        if self._sentry is not None:
            self._sentry.place.beat(time.monotonic(), self._thread.native_id or 0)
            self._sentry.place.put(self._place)

    def close(self) -> None:
        """The rank is done."""
        self._ended.set()
        if self._sentry is not None:
            self._sentry.close()

    def enter(self, phase: str, step: int, stage: str) -> None:
        """The main thread begins something else."""
        self._move(self._at(phase, step, stage))

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Within it the phase is another; afterwards the earlier one, whose time begins anew.

        An exception leaves the phase as it is: the failure will name it.
        """
        before = self._place
        self._move(self._at(phase, before.step, before.stage))
        yield
        self._move(replace(before, since=time.monotonic()))

    def fail(self, error: BaseException) -> NoReturn:
        """Report an exception and end the process."""
        kind = kind_of(error)
        if kind == "exception":
            leave_record(EXIT_FAILURE, error)
        words = traceback.format_exception_only(error)[-1].strip()
        stack = "".join(traceback.format_tb(error.__traceback__)[1:])
        self._leave(kind, " ".join(words.split()), stack)

    def _at(self, phase: str, step: int, stage: str) -> Place:
        return Place(phase, step, stage, time.monotonic(), self._limits.get(phase))

    def _move(self, place: Place) -> None:
        self._place = place
        if self._sentry is not None:
            self._sentry.place.put(place)

    def _look(self) -> None:
        thread = threading.get_native_id()
        while not self._ended.wait(self._poll_s):
            now, place = time.monotonic(), self._place
            if self._sentry is not None:
                self._sentry.place.beat(now, thread)
            late = place.late(now)
            if late or self._board.called():
                self._hang(place.limit_s if late else None)
            elif self._board.decided() and self._leaving.acquire(blocking=False):  # else the main thread is at it
                self._quit()

    def _hang(self, limit_s: float | None) -> NoReturn:
        frames = traceback.extract_stack(sys._current_frames()[self._main])
        try:
            if limit_s is not None:
                self._board.call("hang")
            self._board.write_stacks(python_stacks(), os.getpid())
        except OSError as problem:
            _log.error("the stacks could not be kept: %s", problem)
        found = (
            f"no progress within {limit_s:g} s"
            if limit_s is not None
            else "stopped because another rank hangs or is gone"
        )
        waiting = is_waiting(frames)
        error = found + (", waiting for other ranks" if waiting else "")
        leave_record(EXIT_FAILURE, TimeoutError(error))
        self._leave("hang", error, "".join(traceback.format_list(frames)), waiting=waiting)

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
            error=without_secrets(error),
            stack=without_secrets(stack[-20_000:]),
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
            to_stderr(self._board.words(cause))
        if kind == "hang" and self._sentry is not None and self._board.called() == "hang":
            self._sentry.take_stacks()
        self._quit()

    def _quit(self) -> NoReturn:
        """At once: an ordinary exit would wait for collectives that never end."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # as in to_stderr
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
    board = Board(run.run_dir, rank, world_size, attempt_name(os.environ, os.getpid(), os.getppid()))
    watch = Watch(board, limits_of(run.resilience))
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


def python_stacks() -> str:
    """Python's stacks of all threads of this process."""
    with TemporaryFile("w+", encoding="utf-8", errors="replace") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()
