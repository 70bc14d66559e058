"""Names and meaning of the health series, and what trackers show of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemotron3_megatron.telemetry.records import Health


@dataclass(frozen=True, slots=True)
class Series:
    """One diagnostic with a value for each layer or each role."""

    title: str
    by: Literal["layer", "role"]
    colours: Literal["linear", "logarithmic"] = "linear"


SERIES: dict[str, Series] = {
    "max_violation": Series("Expert load: MaxVio", "layer"),
    "residual_rms": Series("Residual stream: RMS after each layer", "layer", "logarithmic"),
    "layer_gradient_norm": Series("Gradient norm of each layer", "layer", "logarithmic"),
    "router_bias_range": Series("Router bias: largest minus smallest", "layer"),
    "role_gradient_norm": Series("Gradient norm of each role", "role", "logarithmic"),
    "role_gradient_zeros": Series("Share of gradient elements that are 0", "role"),
}
"""``max_violation`` is max load / mean load - 1 over a layer's experts: MaxVio of Wang et al., "Auxiliary-Loss-Free
Load Balancing Strategy for Mixture-of-Experts" (arXiv 2408.15664), over the global batch."""


def max_violation(loads: Sequence[float]) -> float:
    """Load of the fullest expert over the mean load, minus 1: 0 is perfect balance; NaN without any token."""
    total = sum(loads)
    return max(loads) * len(loads) / total - 1 if total > 0 else math.nan


def health_scalars(group: str, health: Health) -> dict[str, float]:
    """Curves for trackers: by role each value, by layer the largest; ``health/max_violation/largest`` and alike.

    Args:
        group: ``health`` in training, ``validation/health`` in validation.
        health: of one record.
    """
    found: dict[str, float] = {}
    for name, values in health.items():
        if name in SERIES and SERIES[name].by == "role":
            found |= {f"{group}/{name}/{row}": value for row, value in values.items()}
        elif values:
            known = [value for value in values.values() if not math.isnan(value)]
            found[f"{group}/{name}/largest"] = max(known, default=math.nan)
    return found


def layer_order(row: str) -> tuple[int, int]:
    """Sorts rows of layers: ``0`` … ``n``, then ``mtp 0`` and on."""
    return (1, int(row.removeprefix("mtp "))) if row.startswith("mtp ") else (0, int(row))
