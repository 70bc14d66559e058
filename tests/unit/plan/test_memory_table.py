"""The memory plan as tables, data and a picture."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.memory import TERMS
from nemotron3_megatron.plan.memory_table import memory_data, memory_tables, write_memory_chart


def run_of(*overrides: str, world_size: int) -> Run:
    recipe, origins = compose(overrides)
    return resolve(recipe, world_size, origins)


def shown(run: Run) -> str:
    console = Console(width=160)
    with console.capture() as capture:
        for table in memory_tables(run):
            console.print(table)
    return capture.get()


def test_every_pipeline_rank_has_its_row_and_the_fullest_is_named() -> None:
    text = shown(run_of("recipe=ultra_nvfp4", "parallel.pp=4", world_size=6144))
    assert "0 (fullest)" in text
    first = [line.split()[0] for line in text.splitlines() if line.strip()]
    assert [word for word in first if word.isdigit()] == ["0", "1", "2", "3"]


def test_advice_is_shown_as_it_is_typed() -> None:
    text = shown(run_of("recipe=ultra_nvfp4", world_size=6144))
    assert "with parallel.recompute=selective parallel.recompute_modules=[" in text  # no markup of rich's
    assert "gb200 (planned)" in text


def test_data_sums_up() -> None:
    data = memory_data(run_of("recipe=super_bf16", world_size=3072))
    assert sum(data[name] for name in TERMS) == pytest.approx(data["total"])
    assert set(data) == {"total", "checkpoint_host", *TERMS}


def test_chart_is_drawn_or_says_why_not(tmp_path: Path) -> None:
    run = run_of("recipe=super_bf16", "parallel.pp=2", world_size=3072)
    here, elsewhere = replace(run, run_dir=tmp_path / "new"), replace(run, run_dir=Path("/proc/cluster"))
    assert write_memory_chart(here) == f"memory chart: {tmp_path}/new/memory.png"
    assert (tmp_path / "new" / "memory.png").read_bytes().startswith(b"\x89PNG")
    assert write_memory_chart(elsewhere).startswith("no memory chart: /proc/cluster/memory.png")
