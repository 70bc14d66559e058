"""What the ranks do in test_specs: every layout by itself."""

from __future__ import annotations

import os
import traceback
from typing import Any

from layouts import measure


def measure_each(folder: str, worlds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """``layouts.measure`` of each world; the stack trace of one that fails, on all ranks alike."""
    results: dict[str, Any] = {}
    for name, options in worlds.items():
        try:
            results |= measure(folder, {name: options})
        except Exception:
            results[name] = traceback.format_exc()
        os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    return results
