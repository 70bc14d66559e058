"""How a step is computed, as the plan says it."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.features import Feature, features
from nemotron3_megatron.plan.html import plan_page
from nemotron3_megatron.plan.report import as_json, show


def run_of(world_size: int, *overrides: str) -> Run:
    recipe, origins = compose([*overrides, f"world_size={world_size}"])
    return resolve(recipe, world_size, origins)


def by_name(run: Run) -> dict[str, Feature]:
    return {feature.name: feature for feature in features(run)}


def test_one_gpu() -> None:
    found = by_name(run_of(1, "recipe=ladder_a315m_1b", "parallel=single"))
    assert found["modules"].state.startswith("Transformer Engine")
    assert found["experts"].state.startswith("one grouped product")
    assert found["tokens to experts"].state == "none travels"
    assert found["choice of experts"].state == "torch's operations"
    assert found["CUDA graph"] == Feature("CUDA graph", "forward and backward pass, from the third step on")
    assert found["gradients"].state == found["parameters"].state == "one replica"


def test_many_gpus_and_native_formats() -> None:
    found = by_name(run_of(512, "recipe=super_nvfp4", "gpu=gb200"))
    assert found["experts"].why == "native NVFP4 and MXFP8 products take them there"
    assert found["CUDA graph"].state == "none"
    assert "token counts" in found["CUDA graph"].why
    assert found["gradients"] == Feature(
        "gradients", "reduced beside the backward pass", "parallel.overlap_grad_reduce=true"
    )


@pytest.mark.parametrize("overrides", [("device=cpu",), ("model.spec=torch",)])
def test_without_transformer_engine(overrides: tuple[str, ...]) -> None:
    found = by_name(run_of(2, "recipe=tiny", *overrides))
    assert found["modules"].state == "torch"
    assert found["modules"].why in (overrides[0], f"model.{overrides[0]}")
    assert found["CUDA graph"].state == "none"
    assert found["weight gradients"].why


def test_the_plan_shows_them_everywhere() -> None:
    run = run_of(2, "recipe=tiny", "device=cpu")
    names = [feature.name for feature in features(run)]
    assert [row["name"] for row in json.loads(as_json(run))["features"]] == names
    console = Console(file=io.StringIO(), width=200)
    show(run, console)
    text, page = console.file.getvalue(), plan_page(run)  # type: ignore[attr-defined]
    for name in names:
        assert name in text
        assert name in page
