"""Every linear of the whole model is on exactly one pipeline stage, under the name that the precision plan uses.

The expected names come from the recipe alone (``linear_modules``), those found from models built by Megatron-Core on
every rank of a pipeline, where layers count from zero again on every stage and virtual chunk.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from launch import run_ranks
from tiny import tiny_run

from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.modules import linear_modules

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "two_mtp_blocks": (1, {"repeated_mtp": False}),
    "no_mtp_no_latent": (1, {"mtp_depths": 0, "latent": None}),
    "pp2": (2, {"pp": 2}),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2, "stack": "ME|M*|ME|-*"}),
    "pp4": (4, {"pp": 4, "stack": "ME|M*|ME|-*"}),
    "pp4_vpp2": (4, {"pp": 4, "vpp": 2, "stack": "M|E|M|*|M|E|-|*"}),
}


def names(worlds: dict[str, dict[str, Any]]) -> dict[str, list[list[str]]]:
    """For each layout: canonical names in each chunk of this rank."""
    port = int(os.environ["MASTER_PORT"])
    found = {}
    for offset, (layout, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        run = tiny_run(int(os.environ["WORLD_SIZE"]), **options)
        platform = select(run.device)
        platform.start(int(os.environ["LOCAL_RANK"]))
        groups = start_groups(run, platform)
        try:
            found[layout] = [list(named_linears(chunk)) for chunk in build_model(run, platform, groups)]
        finally:
            stop_groups()
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[list[list[str]]]]:
    """For each layout: names by rank and chunk."""
    results: dict[str, list[list[list[str]]]] = {}
    for nproc in sorted({size for size, _ in LAYOUTS.values()}):
        worlds = {layout: options for layout, (size, options) in LAYOUTS.items() if size == nproc}
        ranks = run_ranks(names, nproc, worlds=worlds)
        results |= {layout: [rank[layout] for rank in ranks] for layout in worlds}
    return results


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_linear_of_the_plan_is_on_one_stage(layout: str, found: dict[str, list[list[list[str]]]]) -> None:
    nproc, options = LAYOUTS[layout]
    built = [name for rank in found[layout] for chunk in rank for name in chunk]
    expected = [module.name for module in linear_modules(tiny_run(nproc, **options).model)]
    assert sorted(built) == sorted(expected)
    if options.get("vpp", 1) == 1:
        assert built == expected, "not in the order of the forward pass"


def test_interleaved_stages_hold_the_layers_of_their_pattern(found: dict[str, list[list[list[str]]]]) -> None:
    layers = [[_layers(chunk) for chunk in rank] for rank in found["pp2_vpp2"]]
    assert layers == [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]


def _layers(chunk: list[str]) -> list[int]:
    return sorted({int(name.split(".")[2]) for name in chunk if name.startswith("decoder.")})
