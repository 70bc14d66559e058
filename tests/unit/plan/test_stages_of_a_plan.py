"""Plans of runs whose steps differ in shape and whose stages differ in layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from nemotron3_megatron.config import compose, planned_world, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.memory import memory_plan
from nemotron3_megatron.plan.report import as_json, schedule_table
from nemotron3_megatron.plan.schedule_chart import draw_schedule
from nemotron3_megatron.plan.time import estimate, step_time


@pytest.fixture(scope="module")
def long() -> Run:
    """Super's curriculum, resolved for its long-context stages."""
    recipe, origins = compose(["recipe=super_long_context", "stage=long_context_mixed"])
    return resolve(recipe, planned_world(recipe), origins)


def test_the_named_stage_is_planned(long: Run) -> None:
    plan = json.loads(as_json(long))
    assert (plan["world_size"], plan["layout"]["cp"], plan["tokens_per_step"]) == (2048, 64, 16 * 2**20)
    assert [stage["name"] for stage in plan["stages"]] == ["phase1", "phase2", "long_context", "long_context_mixed"]
    assert memory_plan(long).stage.seq_length == 2**20


def test_time_is_the_sum_over_stages_and_lengths(long: Run) -> None:
    gpu = gpu_of(long)
    hours = 0.0
    for stage in long.stages:
        run = long.for_stage(stage)
        for part in stage.by_shape():
            hours += part.steps * step_time(run, gpu, part).total * run.layout.world_size / 3600
    assert estimate(long, gpu).gpu_hours == pytest.approx(hours)
    mixed = long.stages[3].by_shape()
    assert [(part.seq_length, part.steps) for part in mixed] == [(2**20, 507), (4096, 507)]


def test_tables_and_pictures_show_every_length(long: Run, tmp_path: Path) -> None:
    console = Console(width=160, record=True, file=(tmp_path / "table").open("w"))
    console.print(schedule_table(long))
    text = console.export_text()
    assert "1,048,576" in text
    assert "4,096" in text
    assert "TP2 CP64" in text
    draw_schedule(tmp_path / "schedule.png", long)
    assert (tmp_path / "schedule.png").stat().st_size > 10_000
