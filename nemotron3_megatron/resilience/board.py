"""Where ranks leave their failures: ``run_dir/failures/<start>/``, shared by all of them.

Every failing rank writes ``rank_XXXXX.json``; one claims the right to decide, writes ``root_cause.json`` and shows it;
all others leave quietly as soon as they see it. Files, because the store of torch.distributed ends with its rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from nemotron3_megatron.resilience.failure import Failure, root_cause
from nemotron3_megatron.resilience.native import kernel_view, native_stacks

FAILURES, STACKS = "failures", "stacks"
ROOT_CAUSE = "root_cause.json"
LOST_PEER_GRACE_S = 5.0
"""A rank that lost a peer waits this long for the peer's own word, then decides."""
HANG_GRACE_S = 10.0
"""How long the rank that found a hang waits for the stacks of the others; their polls are a second apart."""
ANSWER_S = 5.0
"""How long ranks have to show that they are there, after one of them is found to be gone."""
Call = Literal["hang", "lost"]
"""Why everybody is asked where it is: nothing moves, or a peer is gone."""


class Board:
    """One rank's view of the failures of this start."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, attempt: str) -> None:
        """Prepare; nothing is written before there is something to say.

        Args:
            run_dir: of the run.
            rank: of this process.
            world_size: ranks in all.
            attempt: name of this start, alike on all its ranks.
        """
        self.run_dir, self.attempt = run_dir, attempt
        self.rank, self.world_size = rank, world_size
        self.folder = run_dir / FAILURES / attempt
        self.stacks = run_dir / STACKS / attempt
        # An older file is another start's, whatever its name: a file system's clock may be a little behind.
        self._not_before = time.time() - 60.0

    def decided(self) -> bool:
        """Whether the root cause of this start is known."""
        return self._is_new(self.folder / ROOT_CAUSE)

    def called(self) -> Call | None:
        """Whether some rank wants everybody's stack, and why."""
        path = self.folder / "call"
        if not self._is_new(path):
            return None
        return "hang" if path.read_text(encoding="utf-8").strip() == "hang" else "lost"

    def call(self, why: Call) -> None:
        """Ask every rank for its stack; the first call stands."""
        if self.called() is None:
            _write(self.folder / "call", why)

    def has_answered(self) -> bool:
        """Whether this rank has left its record."""
        return self._is_new(self.folder / f"rank_{self.rank:05d}.json")

    def write_stacks(self, python: str, pid: int) -> None:
        """Keep Python's stacks of this rank, and what the kernel knows of its threads.

        Args:
            python: of all threads.
            pid: of the rank.
        """
        _write(self.stacks / f"rank_{self.rank:05d}.txt", f"{python}\n{kernel_view(pid)}")

    def write_native_stacks(self, pid: int, seconds: float) -> None:
        """Keep the native stacks of this rank, or why there are none; from another process than the rank."""
        _write(self._native_path, native_stacks(pid, seconds))

    def has_native_stacks(self) -> bool:
        """Whether they are there, whole."""
        return self._is_new(self._native_path)

    def words(self, cause: Failure) -> str:
        """What to show of a root cause."""
        stacks = f", stacks: {self.stacks}" if cause.kind == "hang" else ""
        return f"{cause.text()}  records: {self.folder}{stacks}\n"

    @property
    def _native_path(self) -> Path:
        return self.stacks / f"rank_{self.rank:05d}_native.txt"

    def report(self, failure: Failure, *, wait: Callable[[float], None] = time.sleep) -> Failure | None:
        """Leave this rank's failure and see to it that one rank decides.

        Returns:
            The root cause, on the one rank that is to show it; None elsewhere.
        """
        _write(self.folder / f"rank_{self.rank:05d}.json", failure.to_json())
        if failure.kind == "lost_peer" and self._wait_for(self.decided, LOST_PEER_GRACE_S, wait):
            return None
        if not self._claim():
            found = self._wait_for(self.decided, HANG_GRACE_S + LOST_PEER_GRACE_S, wait)
            return None if found else failure  # whoever claimed it is gone
        if failure.kind == "hang":
            self._wait_for(self._all_answered, HANG_GRACE_S, wait)
        elif failure.kind == "lost_peer":
            self.call("lost")  # those who do not answer now are gone
            self._wait_for(self._all_answered, ANSWER_S, wait)
        found_cause = root_cause(failure, self._records())
        _write(self.folder / ROOT_CAUSE, found_cause.to_json())
        return found_cause

    def _records(self) -> list[Failure]:
        paths = sorted(path for path in self.folder.glob("rank_*.json") if self._is_new(path))
        return [Failure.from_json(path.read_text(encoding="utf-8")) for path in paths]

    def _all_answered(self) -> bool:
        return len(self._records()) == self.world_size

    def _claim(self) -> bool:
        claim = self.folder / "claim"
        try:
            with claim.open("x", encoding="utf-8") as file:
                file.write(f"{self.rank}\n")
        except FileExistsError:
            return False
        return True

    def _is_new(self, path: Path) -> bool:
        try:
            return path.stat().st_mtime >= self._not_before
        except OSError:
            return False

    def _wait_for(self, ready: Callable[[], bool], seconds: float, wait: Callable[[float], None]) -> bool:
        deadline = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > deadline:
                return False
            wait(0.1)
        return True


def read_root_causes(run_dir: Path) -> list[Failure]:
    """The root cause of each start of a run that failed, oldest first; what cannot be read is left out."""
    found = []
    for path in (run_dir / FAILURES).glob(f"*/{ROOT_CAUSE}"):
        try:
            found.append(Failure.from_json(path.read_text(encoding="utf-8")))
        except (OSError, ValueError):
            continue
    return sorted(found, key=lambda failure: failure.time_s)


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    partial.replace(path)
