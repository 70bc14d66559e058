"""Hooks see what the GEMMs read, on every layout, and telemetry changes nothing."""

from __future__ import annotations

import math
from typing import Any

import pytest
from launch import run_ranks
from observation import POLICY, losses_with_telemetry, observe
from tiny import tiny_run

from nemotron3_megatron.precision.plan import precision_plan

ONE_RANK: dict[str, dict[str, Any]] = {
    "one": {},
    "recompute_full": {"recompute": "full"},
    "recompute_selective": {"recompute": "selective", "recompute_modules": ("moe",)},
}
TWO_RANKS: dict[str, dict[str, Any]] = {"ep2": {"ep": 2}, "tp2": {"tp": 2}, "pp2": {"pp": 2}}
LAYOUTS = [*ONE_RANK, *TWO_RANKS]

Results = dict[str, dict[str, dict[str, dict[str, float]]]]


@pytest.fixture(scope="module")
def results() -> Results:
    found: Results = {}
    for nproc, worlds in ((1, ONE_RANK), (2, TWO_RANKS)):
        ranks = run_ranks(observe, nproc, worlds=worlds)
        assert all(rank == ranks[0] for rank in ranks), "ranks disagree after the reduction"
        found |= ranks[0]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hooks_see_what_the_gemms_read(layout: str, results: Results) -> None:
    """Equal to rounding of float64 sums: under TP=2 both ranks' GEMMs read the tokens of which hooks see a half."""
    observed, recorded = results[layout]["observed"], results[layout]["recorded"]
    assert observed.keys() == recorded.keys()
    for name, expected in recorded.items():
        assert observed[name] == pytest.approx(expected, rel=1e-9), name


def test_every_quantised_operand_is_observed(results: Results) -> None:
    plan = precision_plan(POLICY, tiny_run(1).model)
    for row in plan.rows:
        found = {name.partition(" ")[2] for name in results["one"]["observed"] if name.startswith(f"{row.module} ")}
        both_ways = {f"{tensor} {along}" for tensor in ("input", "gradient") for along in ("rows", "columns")}
        square, oblong = both_ways | {"weight rows"}, both_ways | {"weight rows", "weight columns"}
        assert found == {"nvfp4": square, "mxfp8": oblong, "bf16": set()}[row.format], row.module


def test_formats_differ_as_they_should(results: Results) -> None:
    """NVFP4's own error on normal numbers is 9.5 % (blocks of 16), MXFP8's 2.7 %; only NVFP4 flushes much."""
    observed = results["one"]["observed"]
    for name, values in observed.items():
        low, high = (0.01, 0.05) if "mixer.out_proj" in name else (0.05, 0.2)
        assert low < values["relative_error"] < high, name
        assert math.isfinite(values["scale_min"]), name
        if "mixer.out_proj" in name:
            assert values["saturation"] == 0, name
            assert -127 <= values["scale_min"] <= values["scale_max"] < 0, name
        else:
            assert values["scale_max"] == 448, name
            assert values["flush_to_zero"] > 0, name


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "one"])
def test_layouts_agree_where_their_gemms_read_the_same(layout: str, results: Results) -> None:
    """Values differ by float32 rounding, about 1e-6, which moves few elements across a rounding boundary.

    Only shares of non-zero elements are coarser: gradients that cancel are 0 in one order of sums and noise in another.
    """
    one, other = results["one"]["observed"], results[layout]["observed"]
    assert one.keys() == other.keys()
    compared = 0
    for name, expected in one.items():
        found = other[name]
        if _reads_the_same(layout, name):
            compared += 1
            assert found["amax"] == pytest.approx(expected["amax"], rel=1e-4), name
            assert found["relative_error"] == pytest.approx(expected["relative_error"], rel=5e-3), name
            assert found["flush_to_zero"] == pytest.approx(expected["flush_to_zero"], abs=5e-3), name
        elif "columns" not in name:  # rotated along tokens, whose order differs
            assert found["amax"] == pytest.approx(expected["amax"], rel=1e-4), name
    assert compared > len(one) // 5


def _reads_the_same(layout: str, name: str) -> bool:
    """Whether the tensors that share an amax, and their blocks, are those of one rank."""
    if layout == "ep2":  # experts take tokens of two micro-batches at once
        return "mlp.experts" not in name or "weight" in name
    if layout == "tp2":  # whole inputs of column-parallel and gradients of row-parallel linears
        column = ("in_proj", "linear_qkv", "shared_experts.linear_fc1")
        row = ("out_proj", "linear_proj", "shared_experts.linear_fc2")
        return ("input" in name and any(c in name for c in column)) or (
            "gradient" in name and any(r in name for r in row)
        )
    return True


def test_telemetry_changes_no_loss() -> None:
    """Also under stochastic rounding, whose random numbers are training's."""
    ((bare, observed),) = run_ranks(losses_with_telemetry, 1)
    assert bare == observed
