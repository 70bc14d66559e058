"""Where ranks leave their failures: ``run_dir/failures/<start>/``, shared by all of them.

Every failing rank writes ``rank_XXXXX.json``; one claims the right to decide, writes ``root_cause.json`` and shows it;
all others leave quietly as soon as they see it. Files, because the store of torch.distributed ends with its rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from nemotron3_megatron.resilience.failure import Failure, attempt_name, root_cause

FAILURES, STACKS = "failures", "stacks"
ROOT_CAUSE = "root_cause.json"
LOST_PEER_GRACE_S = 5.0
"""A rank that lost a peer waits this long for the peer's own word, then decides."""
HANG_GRACE_S = 10.0
"""How long the rank that found a hang waits for the stacks of the others; their polls are a second apart."""
ANSWER_S = 3.0
"""How long ranks have to show that they are there, after one of them is found to be gone."""


class Board:
    """One rank's view of the failures of this start."""

    def __init__(self, run_dir: Path, rank: int, world_size: int, environment: Mapping[str, str]) -> None:
        attempt = attempt_name(environment)
        self.rank, self.world_size = rank, world_size
        self.folder = run_dir / FAILURES / attempt
        self.stacks = run_dir / STACKS / attempt
        # An older file is another start's, whatever its name: a file system's clock may be a little behind.
        self._not_before = time.time() - 60.0

    def decided(self) -> bool:
        """Whether the root cause of this start is known."""
        return self._is_new(self.folder / ROOT_CAUSE)

    def hanging(self) -> bool:
        """Whether some rank has found that this start hangs, and wants everybody's stack."""
        return self._is_new(self.folder / "hang")

    def call_hang(self) -> None:
        """Ask every rank for its stack."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "hang").touch()

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
            self.call_hang()  # those who do not answer now are gone
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
