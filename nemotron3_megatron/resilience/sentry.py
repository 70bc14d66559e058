"""A process beside each rank, for what the rank cannot do itself.

It takes the rank's native stacks, since no process can trace itself; and while native code holds Python's lock, so that
the rank's watch thread stands still, it compares the time with the limit, speaks for the rank and ends it.

``python -m nemotron3_megatron.resilience.sentry ARGUMENTS`` is started by :class:`Sentry`. It imports no torch (15 MiB,
0.05 s), reads one page of shared memory a second, and looks into the run directory only while the rank is mute.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from nemotron3_megatron.logs import to_stderr
from nemotron3_megatron.resilience.board import Board
from nemotron3_megatron.resilience.failure import WAITING, Failure
from nemotron3_megatron.resilience.place import Seen, SharedPlace

STACKS_SIGNAL = signal.SIGRTMIN + 5
"""Writes Python's stacks without Python's lock. No part of glibc, NCCL, Slurm or torchrun uses it."""
MUTE_S = 3.0
"""A watch thread that has not run for so long has no lock; it runs once a second."""
NATIVE_S = 30.0
"""For the native stacks. py-spy took 0.4 s and gdb 6 s for a process with torch (2-core x86 machine, 2026-11-22)."""
LEAVE_S = 5.0
"""How long a mute rank has to leave by itself once the root cause is known."""
_SET_PTRACER = 0x59616D61
"""PR_SET_PTRACER of linux/prctl.h: where only parents may trace (Yama, scope 1), the rank allows its sentry."""
_FRAME = re.compile(r'^  (File ".*", line \S+) (in .*)$', re.MULTILINE)
_THREAD = re.compile(r"^(?:Current thread|Thread) .*$", re.MULTILINE)


class Sentry:
    """The rank's end."""

    def __init__(self, board: Board, poll_s: float, native_s: float = NATIVE_S) -> None:
        """Start the process.

        Raises:
            OSError: it cannot be started.
        """
        self._board, self._native_s = board, native_s
        self.place = SharedPlace.create()
        self._stacks = os.memfd_create("stacks")
        faulthandler.register(STACKS_SIGNAL, file=self._stacks, all_threads=True)
        descriptors = (self.place.descriptor, self._stacks)
        numbers = (board.rank, board.world_size, os.getpid(), *descriptors, poll_s, native_s)
        root = str(Path(__file__).parents[2])
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(board.run_dir), board.attempt, *map(str, numbers)],
            pass_fds=descriptors,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))},
        )
        ctypes.CDLL(None).prctl(_SET_PTRACER, ctypes.c_ulong(self._process.pid), 0, 0, 0)

    def take_stacks(self) -> None:
        """Have the native stacks of this rank written; returns when they are, or cannot be, after a bounded time."""
        self.place.ask()
        deadline = time.monotonic() + self._native_s + MUTE_S
        while time.monotonic() < deadline and self._process.poll() is None and not self._board.has_native_stacks():
            time.sleep(0.05)

    def close(self) -> None:
        """The rank is done. The memory stays: the watch thread may still be writing to it."""
        self._process.kill()
        self._process.wait()


class _Guard:
    """The process' end."""

    def __init__(self, board: Board, parent: int, place: SharedPlace, stacks: int, native_s: float) -> None:
        self._board, self._parent, self._place = board, parent, place
        self._stacks, self._native_s = stacks, native_s
        self._decided_at: float | None = None

    def look(self) -> bool:
        """One look; False: nothing is left to do."""
        if os.getppid() != self._parent:
            return False
        seen, now = self._place.get(), time.monotonic()
        if seen is not None and seen.asked:
            self._board.write_native_stacks(self._parent, self._native_s)
            return False
        if seen is None or now - seen.beat < MUTE_S:
            return True
        return self._stand_in(seen, now)

    def _stand_in(self, seen: Seen, now: float) -> bool:
        """What the watch thread would do if it could run."""
        if seen.place.late(now):
            self._board.call("hang")
        if why := self._board.called():
            self._speak(seen, now)
            if why == "hang" and not self._board.has_native_stacks():
                self._board.write_native_stacks(self._parent, self._native_s)
        if self._board.decided():
            self._decided_at = self._decided_at or now
            if now - self._decided_at > LEAVE_S:
                os.kill(self._parent, signal.SIGKILL)
                return False
        return True

    def _speak(self, seen: Seen, now: float) -> None:
        """Python's stacks and the record of this rank, unless it has left one itself."""
        if self._board.has_answered():
            return
        place, stacks = seen.place, self._python_stacks(seen.thread)
        self._board.write_stacks(stacks, self._parent)
        late = f"no progress within {place.limit_s:g} s" if place.late(now) else "another rank hangs or is gone"
        stack = main_stack(stacks)
        failure = Failure(
            kind="hang",
            rank=self._board.rank,
            host=socket.gethostname(),
            step=place.step,
            stage=place.stage,
            phase=place.phase,
            error=f"{late}; native code has held Python's lock for {now - seen.beat:.0f} s",
            stack=stack,
            waiting=any(part in stack.rpartition("File")[2] for part in WAITING),
            mute=True,
            time_s=time.time(),
            world_size=self._board.world_size,
        )
        if (cause := self._board.report(failure)) is not None:
            to_stderr(self._board.words(cause))

    def _python_stacks(self, thread: int) -> str:
        """Of all threads. The signal goes to the watch thread, which can take it while the main thread cannot."""
        send = getattr(ctypes.CDLL(None), "tgkill", None)  # glibc 2.30
        if send is None or send(self._parent, thread, STACKS_SIGNAL) != 0:
            os.kill(self._parent, STACKS_SIGNAL)
        deadline, size = time.monotonic() + 2.0, -1
        while time.monotonic() < deadline and (not size or size != os.fstat(self._stacks).st_size):
            size = os.fstat(self._stacks).st_size
            time.sleep(0.1)
        return os.pread(self._stacks, 1 << 20, 0).decode(errors="replace")


def main_stack(stacks: str) -> str:
    """The main thread's frames of faulthandler's output, in the order of a traceback: innermost last."""
    last = _THREAD.split(stacks)[-1]  # threads stand in the reverse order of their beginning
    return "".join(f"  {place}, {function}\n" for place, function in reversed(_FRAME.findall(last)))


def main(arguments: Sequence[str]) -> None:
    """The process' life: until its parent is gone, or has been ended."""
    # Torchrun and Slurm send these to all processes of a rank.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    run_dir, attempt = Path(arguments[0]), arguments[1]
    rank, world_size, parent, memory, stacks = map(int, arguments[2:7])
    poll_s, native_s = map(float, arguments[7:])
    guard = _Guard(Board(run_dir, rank, world_size, attempt), parent, SharedPlace(memory), stacks, native_s)
    try:
        while guard.look():
            time.sleep(poll_s)
    except OSError as error:  # the run directory; the rank itself may still come through
        to_stderr(f"nobody looks after rank {rank} any more: {error}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
