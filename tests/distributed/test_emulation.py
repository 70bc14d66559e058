"""Quantised linears inside the model, under TP=2 with sequence parallelism and under EP=2.

Inputs of column-parallel linears and output gradients of row-parallel ones are quantised as whole tensors (Transformer
Engine reduces their amax over the tensor parallel group), weights by shard, experts each on their own.

Tolerance: the found values are float32 sums of exact products, at most 512 terms (in_proj's 320 outputs in dgrad),
then at most two partial sums and a norm: sqrt(512) = 23 roundings of 2^-24, and a factor 8 for cancellation. One wrong
amax changes a tenth of the codes, an error of some percent.
"""

from __future__ import annotations

from typing import Any

import pytest
from emulation import blocky_run, errors
from launch import run_ranks

from nemotron3_megatron.precision.modules import linear_modules

TOLERANCE = 23 * 8 * 2**-24
ONE_RANK: dict[str, dict[str, Any]] = {"one": {}}
TWO_RANKS: dict[str, dict[str, Any]] = {"tp2": {"tp": 2}, "ep2": {"ep": 2}}


@pytest.fixture(scope="module")
def found() -> list[dict[str, dict[str, list[float]]]]:
    """Results of each rank of each world."""
    formats = ["nvfp4", "mxfp8"]
    return [
        *run_ranks(errors, 1, worlds=ONE_RANK, formats=formats),
        *run_ranks(errors, 2, worlds=TWO_RANKS, formats=formats),
    ]


@pytest.mark.parametrize("number_format", ["nvfp4", "mxfp8"])
@pytest.mark.parametrize("layout", [*ONE_RANK, *TWO_RANKS])
def test_each_linear_equals_its_recomputation(layout: str, number_format: str, found: list[Any]) -> None:
    ranks = [rank[f"{layout} {number_format}"] for rank in found if f"{layout} {number_format}" in rank]
    assert len(ranks) == (2 if layout in TWO_RANKS else 1)
    modules = {module.name for module in linear_modules(blocky_run(1).model)}
    for rank in ranks:
        assert rank.keys() == modules
        wrong = {name: values for name, values in rank.items() if not max(values) < TOLERANCE}
        assert not wrong
