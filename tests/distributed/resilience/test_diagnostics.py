"""Health diagnostics are the same under every layout, and agree with Megatron-Core's own counts and norm."""

from __future__ import annotations

import math
from typing import Any

import pytest
from health_measured import measure, wrong_precision
from launch import run_ranks

ONE_RANK: dict[str, dict[str, Any]] = {"one": {}, "recompute": {"recompute": "full"}}
TWO_RANKS: dict[str, dict[str, Any]] = {
    "ep2": {"ep": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "dp2_whole_optimizer": {"distributed_optimizer": False},
}
LAYOUTS = [*ONE_RANK, *TWO_RANKS]


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for nproc, worlds in ((1, ONE_RANK), (2, TWO_RANKS)):
        ranks = run_ranks(measure, nproc, worlds=worlds)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree after the reduction"
        found |= ranks[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_agree(layout: str, results: dict[str, Any]) -> None:
    """To the five digits that are kept, and a rounding of the last; loads are whole numbers and exact."""
    one, other = results["one"], results[layout]
    assert other["hooks_left"] == 0
    assert other["validation"] == one["validation"]
    assert other["health"].keys() == one["health"].keys()
    for name, values in one["health"].items():
        assert other["health"][name] == pytest.approx(values, rel=1e-4, abs=1e-6), name
    assert other["health"]["max_violation"] == one["health"]["max_violation"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roles_make_up_the_gradient(layout: str, results: dict[str, Any]) -> None:
    """Every parameter counts once, unclipped: the squares add up to the norm that Megatron-Core computed."""
    found = results[layout]
    assert found["grad_norm"] > 1.0, "clipping must have acted"
    roles = found["health"]["role_gradient_norm"]
    assert "other" not in roles
    assert math.hypot(*roles.values()) == pytest.approx(found["grad_norm"], rel=1e-4)


def test_expert_loads_are_megatrons(results: dict[str, Any]) -> None:
    found = results["one"]["health"]["max_violation"]
    loads = results["one"]["reference"]["loads"]
    assert list(found) == ["1", "5", "mtp 1"]
    for value, counts in zip(found.values(), loads, strict=True):
        assert value == pytest.approx(max(counts) / (sum(counts) / len(counts)) - 1, abs=1e-5)


def test_residual_stream_is_what_the_final_norm_reads(results: dict[str, Any]) -> None:
    squares = results["one"]["reference"]["squares"]
    assert len(squares) == 4  # micro-batches
    last = results["one"]["health"]["residual_rms"]["7"]
    assert last == pytest.approx(math.sqrt(sum(squares) / 4), rel=1e-4)


def test_gradients_must_accumulate_in_float32() -> None:
    (message,) = run_ranks(wrong_precision, 1)
    assert "output_layer.weight" in message
