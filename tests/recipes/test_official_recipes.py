"""Every official recipe composes, resolves at its own world size, and says who wrote each value."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.compose import RECIPES
from nemotron3_megatron.config.serialize import from_json, to_json
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.plan.report import as_json

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
    assert json.loads(as_json(run))["world_size"] == recipe.world_size


@pytest.mark.parametrize("name", [name for name in NAMES if not name.startswith("tiny")])
def test_resolves_on_what_people_have(name: str) -> None:
    recipe, origins = compose([f"recipe={name}"])
    layouts = {"h200x2": 2, "h100x8": 8, "h200x8": 8, "h100x64": 64, "b200x64": 64}
    if name.startswith("proxy"):  # a batch of 64 sequences in micro-batches of 4: up to 16 ranks
        layouts = {"single": 1, "h200x2": 2, "h100x8": 8, "h200x8": 8}
    if name.startswith("super"):
        layouts |= {"super_h100x64": 64, "super_b200x64": 64}
    if name.endswith(("moe_8b", "8b_mtp")):
        layouts |= {"moe_8b_pretrain": 64}
    for parallel, world_size in layouts.items():
        chosen = compose(["recipe=nano_bf16", f"parallel={parallel}"])[0].parallel
        run = resolve(replace(recipe, parallel=chosen), world_size, origins)
        assert run.layout.dp * run.layout.tp * run.layout.pp == world_size


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_group_file_composes(path: Path) -> None:
    group, choice = path.parent.name, path.stem
    compose(["recipe=nano_bf16", f"{group}={choice}"])


@pytest.mark.parametrize("name", ["nano", "super"])
def test_precision_apart_the_nvfp4_recipe_is_the_bf16_one(name: str) -> None:
    quantised, plain = compose([f"recipe={name}_nvfp4"])[0], compose([f"recipe={name}_bf16"])[0]
    assert replace(quantised, name=plain.name, precision=plain.precision) == plain
    assert quantised.precision.name == "nemotron3_nvfp4"


@pytest.mark.parametrize(
    ("variant", "baseline"),
    [
        ("lightning_bf16", "nano_bf16"),
        ("latent_moe_8b", "standard_moe_8b"),
        ("moe_8b", "standard_moe_8b"),
        ("moe_8b_mtp", "moe_8b"),
        ("proxy_latent_moe", "proxy_standard_moe"),
        ("proxy_moe", "proxy_standard_moe"),
        ("proxy_moe_mtp", "proxy_moe"),
    ],
)
def test_an_ablation_changes_the_model_alone(variant: str, baseline: str) -> None:
    """White paper, section 2.2: "identical hyperparameters"."""
    changed, plain = compose([f"recipe={variant}"])[0], compose([f"recipe={baseline}"])[0]
    assert replace(changed, name=plain.name, model=plain.model) == plain
    mtp = {"mtp_pattern": "", "mtp_depths": 0, "mtp_loss_scaling_factor": plain.model.mtp_loss_scaling_factor}
    experts = {
        "moe_latent_size": plain.model.moe_latent_size,
        "num_moe_experts": plain.model.num_moe_experts,
        "moe_router_topk": plain.model.moe_router_topk,
        "moe_router_topk_scaling_factor": plain.model.moe_router_topk_scaling_factor,
    }
    assert replace(changed.model, **(experts if "latent" in variant else mtp)) == plain.model


@pytest.mark.parametrize("kind", ["latent_moe_8b", "proxy_latent_moe"])
def test_latent_moe_is_the_standard_one_reshaped(kind: str) -> None:
    """White paper, section 2.2: width / 4, experts * 4, top-6 to top-22; sizes about alike."""
    latent = compose([f"recipe={kind}"])[0].model
    standard = compose([f"recipe={kind.replace('latent', 'standard')}"])[0].model
    assert latent.moe_latent_size == standard.hidden_size // 4
    assert (standard.num_moe_experts, standard.moe_router_topk) == (128, 6)
    assert (latent.num_moe_experts, latent.moe_router_topk) == (512, 22)
    sizes, reference = count_parameters(latent), count_parameters(standard)
    assert sizes.total == pytest.approx(reference.total, rel=0.01)
    assert sizes.active == pytest.approx(reference.active, rel=0.01)


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("ladder")])
def test_ladder_is_as_its_readme_says(name: str) -> None:
    recipe, origins = compose([f"recipe={name}"])
    assert recipe.world_size == (64 if name == "ladder_a315m_1b" else 256)  # 8 and 32 nodes of 8 GPUs
    run = resolve(recipe, recipe.world_size, origins)
    schedule, (stage,) = run.schedule, run.stages
    assert schedule.warmup_tokens == 1_024_000 * 8192
    tokens = recipe.stages["pretrain"].tokens.value
    assert schedule.wsd_decay_tokens == pytest.approx(0.15 * tokens, rel=1e-6)
    assert schedule.decay_end_tokens == stage.steps * stage.tokens_per_step  # lr-decay-samples are train-samples
    # The standard deviations follow 0.9 / sqrt(hidden size), to the digits they are written with.
    assert recipe.model.init_method_std == pytest.approx(0.9 / recipe.model.hidden_size**0.5, rel=0.01)


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
    # 8b_latentmoe_1t.sh: 122,070,313 sequences, 3,051,758 of warmup, 24,414,063 of decay.
    recipe, origins = compose(["recipe=standard_moe_8b"])
    schedule = resolve(recipe, 768, origins).schedule
    assert schedule.decay_end_tokens == 122_070_313 * 8192
    assert (schedule.warmup_tokens, schedule.wsd_decay_tokens) == (3_051_758 * 8192, 24_414_063 * 8192)
