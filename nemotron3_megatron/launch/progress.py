"""How far a run is, read off its directory without torch: the newest checkpoint, the last recorded step."""

from __future__ import annotations

import json
import re
from pathlib import Path

from nemotron3_megatron.telemetry.jsonlines import METRICS

_CHECKPOINT = re.compile(r"step_(\d{8,})")
_TAIL_BYTES = 1 << 20
"""Longer than a record, also one with precision statistics of every layer."""


def newest_checkpoint(run_dir: Path) -> int:
    """Step of the newest published checkpoint; 0 where there is none."""
    directory = run_dir / "checkpoints"
    names = (path.name for path in directory.iterdir()) if directory.is_dir() else ()
    return max((int(match[1]) for name in names if (match := _CHECKPOINT.fullmatch(name))), default=0)


def recorded_step(run_dir: Path) -> int:
    """Step of the last whole line of metrics.jsonl; 0 where there is none."""
    path = run_dir / METRICS
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(max(path.stat().st_size - _TAIL_BYTES, 0))
        lines = file.read().splitlines(keepends=True)
    for line in reversed(lines):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0
