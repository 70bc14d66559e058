"""Every parallel layout gives the gradients and losses of one rank, from the same weights.

The batch has uneven loss masks (one sequence without any loss, others from none to 40 % document ends), two MTP
depths, LatentMoE with an expert bias and a strong balancing loss: what upstream gets wrong in several layouts
(Megatron-LM #7452 items 3 and 10, pull requests #7498, #5047, #3768).

Tolerance: the layouts add the same float32 terms in another order. A weight gradient sums over at most
T = 8 * 32 = 256 tokens, each term passing through about 10 layers whose own sums (up to 64 terms) are reordered
too; rounding errors add as a random walk, sqrt(256 * 10 * 64) * 2^-24 = 2.4e-5 of the terms' size. The
comparison is relative to each tensor's norm, which cancellation makes smaller than its terms: a factor 4 is given.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from launch import run_ranks
from layouts import measure

GRADIENT_TOLERANCE = 1e-4
LOSS_TOLERANCE = 1e-6
"""A mean over 256 tokens of float32 losses near 4.2: one part in 2^-20."""

RECOMPUTED: dict[str, Any] = {"recompute": "selective", "recompute_modules": ("moe", "core_attn")}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2_plain": {"distributed_optimizer": False},
    "dp2_overlap": {"overlap": True},
    "tp2": {"tp": 2},
    "tp2_ep2": {"tp": 2, "ep": 2},
    "ep2": {"ep": 2},
    "ep2_gathered": {"ep": 2, "dispatcher": "allgather"},
    "tp2_ep2_gathered": {"tp": 2, "ep": 2, "dispatcher": "allgather"},
    "cp2": {"cp": 2},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2, "stack": "ME|M*|ME|-*"},
}
FOUR_RANKS: dict[str, dict[str, Any]] = {
    "tp2_pp2_ep2": {"tp": 2, "pp": 2, "ep": 2},
    "cp2_ep2_dp2": {"cp": 2, "ep": 2},
    "ep4_gathered": {"ep": 4, "dispatcher": "allgather"} | RECOMPUTED,
}
ONE_RANK: dict[str, dict[str, Any]] = {
    "one": {},
    "recompute_full": {"recompute": "full"},
    "recompute_selective": RECOMPUTED,
}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gradients")
    results: dict[str, Any] = {}
    for nproc, worlds in ((1, ONE_RANK), (2, TWO_RANKS), (4, FOUR_RANKS)):
        results |= run_ranks(measure, nproc, folder=str(folder), worlds=worlds)[0]
    return folder, results


@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS, *ONE_RANK])
def test_gradients_equal_one_rank(layout: str, measured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = measured
    reference, found = (dict(np.load(folder / f"{name}_gradients.npz")) for name in ("one", layout))
    assert found.keys() == reference.keys()
    errors = {name: _relative_error(found[name], reference[name]) for name in reference}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] < GRADIENT_TOLERANCE, f"{worst}: {errors[worst]:.2e}"
    assert all(np.abs(gradient).max() > 0 for gradient in reference.values()), "a parameter got no gradient"


@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS, *ONE_RANK])
def test_logged_losses_equal_one_rank(layout: str, measured: tuple[Path, dict[str, Any]]) -> None:
    """Losses and gradient norms over three updates: also the reduce-scatter and the optimizer's shards are right."""
    _, results = measured
    for found, reference in zip(results[layout], results["one"], strict=True):
        assert found["applied"]
        assert found["losses"] == pytest.approx(reference["losses"], rel=LOSS_TOLERANCE)
        assert found["grad_norm"] == pytest.approx(reference["grad_norm"], rel=GRADIENT_TOLERANCE)


@pytest.mark.parametrize("layout", [*TWO_RANKS, *FOUR_RANKS])
def test_initial_weights_do_not_depend_on_the_layout(layout: str, measured: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = measured
    reference, found = (dict(np.load(folder / f"{name}_weights.npz")) for name in ("one", layout))
    assert found.keys() == reference.keys()
    assert all(np.array_equal(found[name], value) for name, value in reference.items())


def _relative_error(found: Any, reference: Any) -> float:
    return float(np.linalg.norm(found - reference) / np.linalg.norm(reference))
