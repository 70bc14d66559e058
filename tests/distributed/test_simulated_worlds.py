"""Every official recipe on every layout meant for it: sampled ranks of the full world are built and are as planned.

The tensors are Megatron-Core's own; the plan computes the same bytes from the recipe. Process groups are compared with
the order in which Megatron-Core documents to lay out ranks: tensor, context, (expert,) data, pipeline.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from io import StringIO
from typing import Any

import pytest
from launch import run_ranks
from rich.console import Console
from simulated_worlds import WORLDS, World, apart, simulated

from nemotron3_megatron.accelerators import GPUS
from nemotron3_megatron.config.run import Layout
from nemotron3_megatron.plan.memory import GIB, memory_plan
from nemotron3_megatron.plan.memory_advice import OUTSIDE_GIB
from nemotron3_megatron.plan.memory_table import memory_tables
from nemotron3_megatron.plan.simulation import RankReport, report_from, together

pytestmark = pytest.mark.timeout(900)  # the first test waits for all worlds: three minutes on two idle cores


@pytest.fixture(scope="module")
def reports() -> dict[str, tuple[RankReport, ...]]:
    """By what a world holds; two processes, each with the worlds of its share one after the other."""
    chosen = apart()
    halves: list[dict[str, list[dict[str, Any]]]] = run_ranks(
        simulated, 2, timeout_s=840, worlds=[asdict(world) for world in chosen.values()]
    )
    found = {name: tuple(map(report_from, reports)) for half in halves for name, reports in half.items()}
    return {tensors: found[str(world)] for tensors, world in chosen.items()}


@pytest.mark.parametrize("world", WORLDS.values(), ids=str)
def test_sampled_ranks_are_as_planned(world: World, reports: dict[str, tuple[RankReport, ...]]) -> None:
    run = world.run()
    ranks = reports[world.tensors()]
    assert tuple(report.rank for report in ranks) == world.ranks
    plan = memory_plan(run)
    for report in ranks:
        assert (report.error, report.differences) == ("", ())
        assert report.held == report.planned
        assert report.held is not None
        stage = plan.ranks[report.pipeline_rank]
        assert (report.held.weights, report.held.gradients) == (stage.weights, stage.gradients)
        assert places(run.layout, report.rank) == {name: report.groups[name].place for name in ("tp", "cp", "dp", "pp")}
        check_experts(run.layout, report)
    assert together(run, ranks) == ()
    assert {report.pipeline_rank for report in ranks} == set(range(run.layout.pp))
    if world.takes_a_step:
        stepped = [report for report in ranks if report.step]
        assert {report.pipeline_rank for report in stepped} == set(range(run.layout.pp))


@pytest.mark.parametrize("world", [world for world in WORLDS.values() if world.too_large], ids=str)
def test_plan_says_that_a_model_is_too_large(world: World) -> None:
    """Of the GPU that the layout is named after, and with what it would fit."""
    name = (world.override or "").removeprefix("parallel=").partition("x")[0]
    gpu = next(each for each in GPUS if each.name == name)
    run = replace(world.run(), gpu=gpu.name)
    assert memory_plan(run).fullest.total / GIB > gpu.memory_gib - OUTSIDE_GIB
    shown = StringIO()
    console = Console(file=shown, width=200)
    for table in memory_tables(run):
        console.print(table)
    line = next(line for line in shown.getvalue().splitlines() if f"{name} (planned)" in line)
    assert "yes" not in line
    # 18 bytes of each parameter in weights, gradients and FP32 state: 9.9 TB of Ultra, 2.2 TB of Super.
    beyond_help = world.recipe == "ultra_nvfp4" or run.layout.world_size == 8
    assert ("no, nor with" if beyond_help else "with parallel.") in line


def places(layout: Layout, rank: int) -> dict[str, int]:
    """Of a rank in its groups, the tensor-parallel place changing fastest."""
    found = {}
    for name, size in (("tp", layout.tp), ("cp", layout.cp), ("dp", layout.dp), ("pp", layout.pp)):
        rank, found[name] = divmod(rank, size)
    return found


def check_experts(layout: Layout, report: RankReport) -> None:
    """Expert groups ignore tensor and context parallelism and divide the ranks of a pipeline stage anew."""
    inside = report.rank % (layout.world_size // layout.pp)
    place = inside // layout.etp % layout.ep
    assert report.groups["ep"].place == place
    assert report.groups["expt_dp"].place == inside // (layout.etp * layout.ep)
    if report.experts is not None:
        first, last = report.experts
        assert first == place * (last - first + 1)
