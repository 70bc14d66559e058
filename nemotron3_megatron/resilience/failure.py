"""What a failing rank records, and which of the records is the root cause. Nothing here touches a file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any, Literal, Self

Kind = Literal["exception", "hang", "lost_peer", "lost_rank"]

LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "connectfullmesh failed",
    "communicator was aborted",
    "remote process exited",
    "watchdog caught collective operation timeout",
)
"""Parts of gloo's and NCCL's messages on ranks whose peer has gone: they are never the cause."""
LOST_PEER_TYPES = ("DistNetworkError", "DistStoreError")
WAITING = ("torch/distributed/", "megatron/core/pipeline_parallel/p2p_communication")
"""A main thread whose innermost frame lies there waits for other ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why one rank cannot go on; as ``rank_XXXXX.json``, and of one rank as ``root_cause.json``."""

    kind: Kind
    rank: int
    host: str
    step: int
    """The optimizer step it was in (the first is 1); 0 before the first."""
    stage: str
    phase: str
    """What the rank was doing: ``start``, ``first step``, ``step``, ``save``, ``evaluation`` or ``end``."""
    error: str
    """One line: type and message of the exception; of a hang, what was waited for."""
    stack: str
    """Python's traceback, innermost frame last."""
    waiting: bool = False
    """Of a hang: the rank waits for others, so that the reason lies elsewhere."""
    mute: bool = False
    """Of a hang: native code holds Python's lock; a collective gives it up while it waits."""
    time_s: float
    """Seconds since 1970."""
    world_size: int
    others: str = ""
    """Of a root cause: one line on what the other ranks recorded."""

    def to_json(self) -> str:
        """One JSON object."""
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`; keys of newer versions are ignored.

        Raises:
            ValueError: not the record of a failure.
        """
        found = json.loads(text)
        try:
            return cls(**{key: value for key, value in found.items() if key in cls.__slots__})
        except (TypeError, AttributeError) as error:
            raise ValueError(f"not the record of a failure: {error}") from error

    def text(self) -> str:
        """The message for people; says everything once."""
        place = f"in step {self.step}" if self.step else "before the first step"
        stage = f"stage {self.stage}, " if self.stage else ""
        lines = [
            f"failed: rank {self.rank} of {self.world_size} on {self.host}, {place} ({stage}{self.phase}): {self.error}"
        ]
        lines += ["  " + line for line in self.stack.rstrip().splitlines()]
        return "\n".join([*lines, *([f"  {self.others}"] if self.others else [])]) + "\n"


def kind_of(error: BaseException) -> Kind:
    """Whether an exception is a reason of its own or the echo of another rank's end."""
    text = str(error).lower()
    lost = type(error).__name__ in LOST_PEER_TYPES or any(part in text for part in LOST_PEER)
    return "lost_peer" if lost and isinstance(error, RuntimeError) else "exception"


def root_cause(mine: Failure, records: Sequence[Failure]) -> Failure:
    """The record to show, with a word on the others.

    Args:
        mine: of the rank that decides.
        records: of all ranks that left one, also ``mine``.
    """
    if mine.kind == "exception":
        return mine
    known = {record.rank for record in records}
    missing = [rank for rank in range(mine.world_size) if rank not in known]
    own = [record for record in records if record.kind == "exception"]
    if own:
        return min(own, key=lambda record: record.time_s)
    if mine.kind == "lost_peer" and missing:
        error = f"ended without a word: killed, out of memory, or its node is lost (rank {mine.rank}: {mine.error})"
        gone = replace(mine, kind="lost_rank", rank=missing[0], host="an unknown host", error=error, stack="")
        return replace(gone, others=f"{_count(len(known), 'rank')} answered, {ranks_text(missing)} did not")
    first = min(records, key=_suspicion)
    silent = f"; no answer from {ranks_text(missing)}" if missing else ""
    return replace(first, others=_where(records) + silent)


def ranks_text(ranks: Iterable[int]) -> str:
    """``rank 3``, ``ranks 0-2, 7``."""
    numbers = sorted(ranks)
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    text = ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
    return f"rank{'s' if len(numbers) != 1 else ''} {text}"


def attempt_name(environment: Mapping[str, str], process: int, parent: int) -> str:
    """A name for this start that all its ranks derive alike without talking, and no other start of the run has.

    A SLURM job and its requeues, torchrun's rendezvous and its restarts, and the port of the world tell starts apart;
    on one node also torchrun's process, since the same command once more has the same port.

    Args:
        environment: of this rank.
        process: its number.
        parent: of the process that started it.
    """
    names = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    parts = [environment[name] for name in names if environment.get(name, "none") != "none"]
    world = environment.get("WORLD_SIZE", "1")
    if world == "1":
        parts.append(f"process-{process}")
    elif "TORCHELASTIC_RESTART_COUNT" in environment and environment.get("LOCAL_WORLD_SIZE") == world:
        parts.append(f"torchrun-{parent}")
    return "_".join("".join(c if c.isalnum() or c == "-" else "-" for c in part)[:40] for part in parts)


def _suspicion(record: Failure) -> tuple[int, bool, bool, float, int]:
    """Least of the rank that holds up the others."""
    return record.step, record.waiting, not record.mute, record.time_s, record.rank


def _where(records: Sequence[Failure]) -> str:
    places: dict[str, list[int]] = {}
    for record in records:
        places.setdefault(f"step {record.step}, {record.phase}: {innermost(record.stack)}", []).append(record.rank)
    return "; ".join(f"{ranks_text(ranks)}: {place}" for place, ranks in sorted(places.items(), key=lambda p: p[1]))


def innermost(stack: str) -> str:
    """The last frame of a traceback: ``all_reduce (distributed_c10d.py:2929)``."""
    frames = [line.strip() for line in stack.splitlines() if line.strip().startswith('File "')]
    if not frames:
        return "somewhere"
    name, line, function = (part.strip() for part in frames[-1].split(",", 2))
    file = name.removeprefix('File "').rstrip('"').rsplit("/", 1)[-1]
    return f"{function.removeprefix('in ')} ({file}:{line.removeprefix('line ')})"


def is_waiting(frames: Sequence[Any]) -> bool:
    """Whether the innermost of traceback frames (``filename``) is a collective's."""
    return bool(frames) and any(part in frames[-1].filename for part in WAITING)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
