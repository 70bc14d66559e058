"""Long sequences: memory is linear in their length, and what goes in parts trains the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import run_ranks
from long_steps import growth, measure_whole_and_in_parts

LENGTH = 8192
LINEAR = 2.1
"""Growth of the peak at twice the length: 2 for what every token keeps, less with what does not grow, and slack of the
allocator. A mask of all queries and keys grows by 4: with it the step grew 2.6 times, without 1.5 times."""
GRADIENT_TOLERANCE = 1e-4
"""As in test_layouts.py: the same float32 terms are added in another order."""


def test_memory_of_a_step_is_linear_in_the_length() -> None:
    """CP = 2, one document, MTP, layers recomputed; resident memory, in fresh processes."""
    short, long = (max(run_ranks(growth, 2, length=length)) for length in (LENGTH, 2 * LENGTH))
    assert short > 0
    assert long < LINEAR * short, f"{short / 2**20:.0f} MiB at {LENGTH:,} tokens, {long / 2**20:.0f} at twice as many"


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_in_parts_train_the_same(ep: int, tmp_path: Path) -> None:
    world: dict[str, Any] = {"ep": ep, "recompute": "full"}
    # 2 experts a token, rows of 16 latent and twice 24 hidden float32 values: 2 sequences of 7 positions.
    limit = 2 * 7 * 2 * (16 + 2 * 24) * 4
    results = run_ranks(measure_whole_and_in_parts, ep, folder=str(tmp_path), world=world, limit_bytes=limit)[0]
    assert results["largest_part"] == 7
    whole, parts = (dict(np.load(tmp_path / f"{name}_gradients.npz")) for name in ("whole", "parts"))
    for name, expected in whole.items():
        error = np.linalg.norm(parts[name] - expected) / np.linalg.norm(expected)
        assert error < GRADIENT_TOLERANCE, f"{name}: {error:.1e}"
    for found, expected in zip(results["parts"], results["whole"], strict=True):
        assert found["losses"] == pytest.approx(expected["losses"], rel=1e-6)
