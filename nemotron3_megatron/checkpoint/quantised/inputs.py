"""How large the inputs of a run's quantised linears were, from its metrics."""

from __future__ import annotations

import json
from typing import Any

from nemotron3_megatron.checkpoint.huggingface.reading import CheckpointReader
from nemotron3_megatron.checkpoint.huggingface.source import run_dir_of


def observed_amax(reader: CheckpointReader) -> dict[str, float]:
    """Largest magnitude of each linear's input in its last sampled step up to the checkpoint's, by the plan's name.

    Empty where there are no metrics (an imported model) or nothing was observed. Numbers have 5 significant digits.
    """
    found: dict[str, float] = {}
    run_dir, step = run_dir_of(reader.path), reader.manifest.step
    path = None if run_dir is None else run_dir / "metrics.jsonl"
    if path is None or not path.is_file():
        return found
    with path.open(encoding="utf-8", errors="replace") as lines:
        # Most lines have no samples, and only they are long.
        for line in (line for line in lines if '"precision"' in line):
            record = _record(line)
            if record.get("step", step + 1) <= step and isinstance(record.get("precision"), list):
                found |= {
                    sample["module"]: sample["amax"]
                    for sample in record["precision"]
                    if (sample["tensor"], sample["direction"]) == ("input", "rows") and sample["amax"]
                }
    return found


def _record(line: str) -> dict[str, Any]:
    """A step's record; nothing for a line torn by a kill or a full disk."""
    try:
        return dict(json.loads(line))
    except (ValueError, TypeError):
        return {}
