"""Every official recipe composes, resolves at its own world size, and says who wrote each value."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.compose import RECIPES
from nemotron3_megatron.config.serialize import from_json, to_json

NAMES = sorted(path.stem for path in (RECIPES / "recipe").glob("*.yaml"))
GROUPS = sorted(path for path in RECIPES.rglob("*.yaml") if path.parent.name not in ("recipes", "recipe"))


@pytest.mark.parametrize("name", NAMES)
def test_resolves_at_its_world_size(name: str) -> None:
    recipe, origins = compose([f"recipe={name}"])
    assert recipe.name == name
    assert recipe.world_size is not None, "an official recipe says how many ranks it is for"
    run = resolve(recipe, recipe.world_size, origins)
    assert from_json(to_json(run)) == run
    assert all(Path(origin.place.split(":")[0]).suffix == ".yaml" for origin in run.origins)


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_group_file_composes(path: Path) -> None:
    group, choice = path.parent.name, path.stem
    compose(["recipe=nano_bf16", f"{group}={choice}"])


@pytest.mark.parametrize("name", ["nano", "super"])
def test_precision_apart_the_nvfp4_recipe_is_the_bf16_one(name: str) -> None:
    quantised, plain = compose([f"recipe={name}_nvfp4"])[0], compose([f"recipe={name}_bf16"])[0]
    assert replace(quantised, name=plain.name, precision=plain.precision) == plain
    assert quantised.precision.name == "nemotron3_nvfp4"


def test_published_schedules() -> None:
    """Super report and script: decay from 19.975T to 24.975T tokens; Nano: 25,165,824 tokens a step, phases 94 : 6."""
    recipe, origins = compose(["recipe=super_bf16"])
    schedule = resolve(recipe, 3072, origins).schedule
    assert schedule.decay_end_tokens == 3_048_706_055 * 8192
    assert (schedule.decay_end_tokens - schedule.wsd_decay_tokens) // 8192 == 2_438_354_492
    recipe, origins = compose(["recipe=ultra_nvfp4"])
    run = resolve(recipe, 6144, origins)
    # Ultra report: 15T + 5T tokens, the decay over the last 5T (a stage is rounded up to whole steps).
    assert [stage.num_microbatches for stage in run.stages] == [2, 2]
    assert run.schedule.decay_end_tokens == pytest.approx(20e12, rel=1e-5)
    assert run.schedule.wsd_decay_tokens == 610_351_563 * 8192
    assert run.schedule.warmup_tokens == 24_414_063 * 8192
    recipe, origins = compose(["recipe=nano_bf16"])
    run = resolve(recipe, 3072, origins)
    assert [stage.tokens_per_step for stage in run.stages] == [25_165_824, 25_165_824]
    assert run.stages[0].steps / run.total_steps == pytest.approx(0.94, abs=1e-4)
