"""Updates over prepared lists of tensors equal Megatron-Core's, with AdamW written out in place of CUDA's kernels.

Tolerances: a step moves a master by about its rate, 1e-2. In FP32 gradients agree to 1e-4 (test_layouts.py), three
steps to 3e-6. In BF16 weights that differ in the last bit may turn the sign of a gradient that is next to nothing, and
with it a whole step: masters are compared to 1e-2, norms and losses to 2^-8, and the first norm, of equal weights, to
1e-6.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks
from updates_checks import compare, resumed

WORLDS: dict[str, dict[str, Any]] = {
    "bf16 dp2": {"dtype": "bf16"},
    "bf16 ep2 overlapped": {"dtype": "bf16", "ep": 2, "overlap": True},
    "fp32 tp2": {"tp": 2},
}


@pytest.fixture(scope="module")
def results() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_ranks(compare, 2, worlds=WORLDS)
    return found


@pytest.mark.parametrize("world", WORLDS)
def test_same_training(world: str, results: list[dict[str, Any]]) -> None:
    for rank in (each[world] for each in results):
        assert rank["norms"][0][0] == pytest.approx(rank["norms"][1][0], rel=1e-6)
        assert rank["norms"][0] == pytest.approx(rank["norms"][1], rel=2**-8)
        assert rank["losses"][0] == pytest.approx(rank["losses"][1], rel=2**-8)
        close = 3e-6 if world.startswith("fp32") else 1e-2
        assert rank["masters"] < close
        assert rank["weights"] < close


@pytest.mark.parametrize("world", WORLDS)
def test_all_kernels_were_used(world: str, results: list[dict[str, Any]]) -> None:
    """FP32 parameters of a BF16 model, and gradients above the norm they are clipped to."""
    halves = ["halves"] if world.startswith("bf16") else []
    for rank in (each[world] for each in results):
        assert rank["calls"] == [*halves, "scale", "wholes"]


def test_resuming_from_a_checkpoint_changes_nothing(tmp_path: Path) -> None:
    """Moments and masters are read from, and into, the long tensors of which the optimizer's are views: bit for bit."""
    options = {"dtype": "bf16", "ep": 2}
    found: list[dict[str, Any]] = run_ranks(resumed, 2, folder=str(tmp_path), options=options)
    for rank in found:
        assert rank["distance"] == 0
        assert rank["tensors"] > 100
        assert rank["moved"] > 0
