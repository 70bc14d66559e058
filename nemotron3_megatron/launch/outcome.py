"""What became of a segment: the ranks' real exit codes and the one failure that the others followed from."""

from __future__ import annotations

import json
import re
import signal
import socket
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DONE, USER_ERROR, START_AGAIN = 0, 2, 75
"""Exit codes of train.py (docs/training.md)."""

_EXITS = "exits"
_FAILURES, _ROOT_CAUSE = "failures", "root_cause.json"
"""As ``resilience.board`` writes them, in a directory that begins with ``JOB_RESTARTS``."""
_LOST = "lost_rank"
_FAILURE = 1
_NODE = "node_*.json"
_RANK = "rank_*.json"
_VARYING = re.compile(r"0x[0-9a-fA-F]+|\d+")
_NOTICED_WITHIN_S = 2.0
"""torchrun looks at its processes ten times a second and writes whole seconds; nodes' clocks agree to less."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a segment ended."""

    code: int
    """0, 2 and 75 as train.py's; negative: a signal ended the first failing rank; else a failure."""
    error: str = ""
    """One line; empty where nothing failed."""
    rank: int | None = None
    host: str | None = None

    @property
    def failed(self) -> bool:
        """True unless the target was reached, or it was saved and wants to go on."""
        return self.code not in (DONE, START_AGAIN)

    def same_error(self, other: Outcome) -> bool:
        """True for one and the same failure: numbers in the message, such as addresses and times, may differ."""
        return self.failed and other.failed and (self.code, _bare(self.error)) == (other.code, _bare(other.error))


@dataclass(frozen=True, slots=True)
class RankEnd:
    """One rank's end, as its torchrun saw it."""

    rank: int
    code: int
    """Negative: the number of the signal that killed it."""
    time: float


def exits_directory(run_dir: Path, segment: str) -> Path:
    """Where the ranks and nodes of a segment leave their exit records."""
    return run_dir / _EXITS / segment


def write_node(directory: Path, node: int, ends: list[RankEnd]) -> None:
    """Record the failing ranks of this node; called by ``launch.node``."""
    record = {"node": node, "host": socket.gethostname(), "ends": [asdict(end) for end in ends]}
    (directory / f"node_{node:05d}.json").write_text(json.dumps(record), encoding="utf-8")


def read_outcome(run_dir: Path, segment: str, code: int) -> Outcome:
    """The outcome of a segment: its first failure in time, which the others followed from.

    Args:
        run_dir: of the run.
        segment: ``JOB.RESTARTS``.
        code: what ``srun`` ended with; believed where there is no record.
    """
    directory = exits_directory(run_dir, segment)
    ends = [(RankEnd(**end), str(node.get("host"))) for node in _records(directory, _NODE) for end in node["ends"]]
    if any(end.code == START_AGAIN for end, _ in ends):
        return Outcome(START_AGAIN)
    decided = list(_records(run_dir / _FAILURES, f"{segment.replace('.', '_')}_*/{_ROOT_CAUSE}"))
    if decided:  # the ranks have agreed on it themselves; how a silent one died, only its node knows
        cause = decided[-1]
        died = [pair for pair in ends if cause.get("kind") == _LOST and pair[0].rank == cause["rank"]]
        if died:
            end, host = died[0]
            return Outcome(end.code, _explained(end.code), end.rank, host)
        return Outcome(_FAILURE, str(cause["error"]), int(cause["rank"]), str(cause["host"]))
    told = {int(record["rank"]): record for record in _records(directory, _RANK)}
    found = [(float(record["time"]), _told(record)) for record in told.values()]
    for end, host in ends:
        if end.rank not in told:
            # A silent death shows when torchrun looks; by then its peers may have told of a closed connection.
            found.append((end.time - _NOTICED_WITHIN_S, Outcome(end.code, _explained(end.code), end.rank, host)))
    # torchrun ends the ranks that are left with SIGTERM: the cause only where nobody has another.
    found = [pair for pair in found if pair[1].code != -signal.SIGTERM] or found
    if found:
        return min(found, key=lambda pair: pair[0])[1]
    return Outcome(code, "" if code in (DONE, START_AGAIN) else f"srun ended with {code}; no rank left a record")


def _told(record: dict[str, Any]) -> Outcome:
    first_line = (str(record["message"]).strip().splitlines() or [""])[0]
    error = f"{record['kind']}: {first_line}" if first_line else str(record["kind"])
    return Outcome(int(record["code"]), error, int(record["rank"]), str(record["host"]))


def _records(directory: Path, pattern: str) -> Iterator[dict[str, Any]]:
    """JSON objects; a record torn by a kill or a full disk says nothing."""
    for path in sorted(directory.glob(pattern)):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(record, dict):
            yield record


def _explained(code: int) -> str:
    if code in (DONE, START_AGAIN):
        return ""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        hint = " (out of memory, or a lost node?)" if code == -signal.SIGKILL else ""
        return f"killed by {name}{hint}"
    return f"exit code {code} without an exception"


def _bare(error: str) -> str:
    return _VARYING.sub("#", error)
