"""The chain's own record, ``RUN/segments.jsonl``: one line when a segment begins, one when it ends. Append only."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nemotron3_megatron.launch.outcome import Outcome
from nemotron3_megatron.launch.progress import newest_checkpoint, recorded_step

FILE_NAME = "segments.jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One start of the run under Slurm."""

    name: str
    """``JOB.RESTARTS``, or ``JOB.RESTARTS-TRY`` after a restart in the same job."""
    nodes: int
    begin_time: float
    begin_checkpoint: int
    """Step it continued from; 0 is the beginning."""
    end_time: float | None = None
    """None: still running, or lost without a word (a dead node, a kill)."""
    end_checkpoint: int = 0
    end_step: int = 0
    """Last step that metrics.jsonl holds."""
    outcome: Outcome | None = None
    verdict: str = ""

    @property
    def job(self) -> str:
        """Number of its Slurm job."""
        return self.name.partition(".")[0]


def begin(run_dir: Path, segment: str, *, nodes: int) -> None:
    """Note that a segment begins."""
    _append(run_dir, {"event": "begin", "segment": segment, "nodes": nodes, "checkpoint": newest_checkpoint(run_dir)})


def end(run_dir: Path, segment: str, outcome: Outcome, verdict: str) -> None:
    """Note how a segment ended and what follows."""
    told = {"code": outcome.code, "error": outcome.error, "rank": outcome.rank, "host": outcome.host}
    places = {"checkpoint": newest_checkpoint(run_dir), "step": recorded_step(run_dir)}
    _append(run_dir, {"event": "end", "segment": segment, **places, **told, "verdict": verdict})


def read_segments(run_dir: Path) -> list[Segment]:
    """All segments in the order of their beginning; lines torn by a kill are left out."""
    begun: dict[str, dict[str, Any]] = {}
    ended: dict[str, dict[str, Any]] = {}
    for event in _events(run_dir):
        into = begun if event.get("event") == "begin" else ended
        into[str(event.get("segment"))] = event
    return [_segment(name, event, ended.get(name)) for name, event in begun.items()]


def _segment(name: str, begun: dict[str, Any], ended: dict[str, Any] | None) -> Segment:
    segment = Segment(
        name=name,
        nodes=int(begun["nodes"]),
        begin_time=float(begun["time"]),
        begin_checkpoint=int(begun["checkpoint"]),
    )
    if ended is None:
        return segment
    return replace(
        segment,
        end_time=float(ended["time"]),
        end_checkpoint=int(ended["checkpoint"]),
        end_step=int(ended["step"]),
        outcome=Outcome(int(ended["code"]), str(ended["error"]), ended["rank"], ended["host"]),
        verdict=str(ended["verdict"]),
    )


def _events(run_dir: Path) -> Sequence[dict[str, Any]]:
    path = run_dir / FILE_NAME
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            found.append(event)
    return found


def _append(run_dir: Path, event: dict[str, Any]) -> None:
    line = json.dumps({"time": time.time(), **event}) + "\n"
    descriptor = os.open(run_dir / FILE_NAME, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o640)
    try:
        os.write(descriptor, line.encode())  # one call: lines of two writers never mix
    finally:
        os.close(descriptor)
