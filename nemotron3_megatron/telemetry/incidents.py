"""``incidents.jsonl``: starts, ends and everything out of the ordinary, with the time; one JSON object a line.

Unlike ``metrics.jsonl`` it is never shortened: what happened in steps that were trained again is part of the story.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from nemotron3_megatron.telemetry.records import StepRecord

FILE_NAME = "incidents.jsonl"
IncidentKind = Literal["start", "end", "refused", "spike", "transient", "rollback", "straggler"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Incident:
    """Something that happened at ``time_s`` (seconds since 1970) after ``step`` optimizer steps."""

    kind: IncidentKind
    step: int
    text: str = ""
    time_s: float = 0.0


class IncidentLog:
    """Appends to the file of a run; only rank 0 writes, others call it to no effect."""

    def __init__(self, run_dir: Path, *, writes: bool, clock: Callable[[], float] = time.time) -> None:
        self._path = run_dir / FILE_NAME if writes else None
        self._clock = clock

    def add(self, kind: IncidentKind, step: int, text: str = "") -> None:
        """Append one incident, now."""
        if self._path is None:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        found = Incident(kind=kind, step=step, text=text, time_s=self._clock())
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(found)) + "\n")


def read_incidents(run_dir: Path) -> list[Incident]:
    """All incidents in order; lines torn by a kill are left out."""
    path = run_dir / FILE_NAME
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []:
        try:
            fields = json.loads(line)
            found.append(Incident(**{key: fields[key] for key in Incident.__slots__}))
        except (ValueError, KeyError, TypeError):
            continue
    return found


def goodput(incidents: Sequence[Incident], steps: Sequence[StepRecord]) -> float | None:
    """Useful share of the time from the first start to the last record: seconds in steps that stand, over all seconds.

    Time between starts counts (a run that waits in a queue does not train), and so do steps that a later start
    trained again: they are lost. None without a start or a timed record.
    """
    starts = [incident.time_s for incident in incidents if incident.kind == "start"]
    ends = [record.time_s for record in steps if record.time_s is not None]
    if not starts or not ends or max(ends) <= min(starts):
        return None
    return min(sum(record.step_time_s for record in steps) / (max(ends) - min(starts)), 1.0)
