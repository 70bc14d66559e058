"""What the rank does in test_te_doctor.py: the doctor's Transformer Engine checks, on a CPU."""

from __future__ import annotations

import os
from dataclasses import replace

import te_on_cpu
import torch


def verdicts() -> dict[str, list[tuple[str, float, float]]]:
    """Each family's comparisons: what, error, bound."""
    te_on_cpu.install(os.environ["TRANSFORMER_ENGINE_SOURCES"], (9, 0))
    from nemotron3_megatron.platform.checks import experts, linears

    families = {
        "norm + linear": linears.NORM_LINEAR,
        "column linear": linears.COLUMN_LINEAR,
        "row linear": linears.ROW_LINEAR,
        "grouped experts": experts.GROUPED_PRODUCT,
    }
    found = {}
    for name, family in families.items():
        outcome = replace(family, needs=(), on_cpu=True)(torch.device("cpu"), torch.bfloat16)
        found[name] = [(each.what, each.error, each.bound) for each in outcome.comparisons]
    return found
