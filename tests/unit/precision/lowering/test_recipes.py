"""Plan rows as Megatron-Core's per-module recipes, checked by Megatron-Core's own classes."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from megatron.core.enums import Fp4Recipe, Fp8Recipe
from megatron.core.quantization.quant_config import RecipeConfig
from megatron.core.quantization.utils import get_quant_config_or_none
from megatron.core.transformer import TransformerConfig

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.precision.lowering.environment import NEUTRAL, check_environment
from nemotron3_megatron.precision.lowering.recipes import FACTORIES, megatron_yaml, model_fields, module_recipe
from nemotron3_megatron.precision.lowering.variants import VARIANTS, variant_name
from nemotron3_megatron.precision.operands import gemms
from nemotron3_megatron.precision.parse import parse_policy
from nemotron3_megatron.precision.plan import PrecisionPlan, precision_plan
from nemotron3_megatron.precision.policy import Nvfp4

POLICY = {
    "default": "nvfp4",
    "rules": [
        {"layers": ["last 15%"], "format": "bf16"},
        {"role": ["attention.qkv", "attention.proj"], "format": "bf16"},
        {"role": ["moe.latent_down", "moe.latent_up"], "format": "bf16"},
        {"block": "mtp", "format": "bf16"},
        {"role": "mamba.out_proj", "format": "mxfp8"},
    ],
}
RECIPE_FIELDS = {
    "fp8_quantization_recipe",
    "fp4_quantization_recipe",
    "custom_recipe_factory",
    "fp8_format",
    "override_quantized_autocast",
    "override_nonquantized_autocast",
    "tp_only_amax_red",
    "fp8_param",
    "fp4_param",
}
"""Of ``TEQuantizationRecipe`` in Megatron-Core 0.19.2, which cannot be imported without Transformer Engine."""


def super_plan(**policy: Any) -> PrecisionPlan:
    recipe, origins = compose(["recipe=super_bf16"])
    return precision_plan(parse_policy({**POLICY, **policy}), resolve(recipe, 1024, origins).model)


def test_variants_are_distinct_and_known_by_name() -> None:
    assert len(VARIANTS) == len(set(VARIANTS.values())) == 9
    assert {variant_name(operands): operands for operands in VARIANTS.values()} == VARIANTS
    assert VARIANTS["nvfp4"] == gemms("nvfp4", Nvfp4())
    assert VARIANTS["nvfp4_no_rht"] == gemms("nvfp4", Nvfp4(hadamard=None))
    assert VARIANTS["nvfp4_no_2d_no_sr"] == gemms("nvfp4", Nvfp4(weight_block=(1, 16), stochastic_rounding=None))
    with pytest.raises(ValueError, match="no variant"):
        variant_name(gemms("bf16", Nvfp4()))


def test_published_formats_are_transformer_engines_own_recipes() -> None:
    assert module_recipe("nvfp4", VARIANTS["nvfp4"], "native")["fp4_quantization_recipe"] == Fp4Recipe.nvfp4
    assert module_recipe("mxfp8", VARIANTS["mxfp8"], "native")["fp8_quantization_recipe"] == Fp8Recipe.mxfp8


def test_ablations_and_emulation_name_a_factory_of_their_own() -> None:
    ablation = module_recipe("nvfp4", VARIANTS["nvfp4_no_sr"], "native")
    assert ablation["fp4_quantization_recipe"] == Fp4Recipe.custom
    assert ablation["custom_recipe_factory"] == "nemotron3_megatron.precision.lowering.native.nvfp4_no_sr"
    emulated = module_recipe("mxfp8", VARIANTS["mxfp8"], "emulated")
    assert emulated["fp8_quantization_recipe"] == Fp8Recipe.custom
    assert emulated["custom_recipe_factory"] == f"{FACTORIES['emulated']}.mxfp8"


@pytest.mark.parametrize("backend", ["native", "emulated"])
def test_every_recipe_has_known_fields_one_format_and_acts_in_any_context(backend: Any) -> None:
    recipes = [module_recipe(name.split("_")[0], variant, backend) for name, variant in VARIANTS.items()]  # type: ignore[arg-type]
    for recipe in [*recipes, module_recipe("bf16", gemms("bf16", Nvfp4()), backend)]:
        assert recipe.keys() <= RECIPE_FIELDS
        assert len(recipe.keys() & {"fp8_quantization_recipe", "fp4_quantization_recipe"}) == (len(recipe) > 2)
        assert recipe["override_quantized_autocast"] is recipe["override_nonquantized_autocast"] is True


@pytest.mark.parametrize("nvfp4", [{}, {"hadamard": None}])
def test_the_file_gives_each_module_its_row_and_nothing_else_any(nvfp4: dict[str, Any]) -> None:
    plan = super_plan(nvfp4=nvfp4)
    recipes = RecipeConfig.from_config_dict(yaml.safe_load(megatron_yaml(plan)))
    for row in plan.rows:
        found = get_quant_config_or_none(row.module, recipes)
        assert found.config["training_recipe"] == module_recipe(row.format, row.gemms, "native")
    for other in ("decoder.layers.1.mlp.router", "decoder.layers.200.mixer.in_proj", "output_layer"):
        assert get_quant_config_or_none(other, recipes) is None


def test_the_file_says_what_must_be_set_beside_it() -> None:
    first = megatron_yaml(super_plan()).splitlines()[0]
    assert first.startswith("#")
    assert "pipeline_model_parallel_size=1" in first
    assert "fp4=e2m1, fp4_recipe=nvfp4, first_last_layers_bf16=False" in first


@pytest.mark.parametrize(
    ("plan_format", "fp4", "fp8"),
    [("nvfp4", "e2m1", None), ("mxfp8", None, "e4m3")],
)
def test_native_models_open_a_context_on_every_layer(plan_format: str, fp4: str | None, fp8: str | None) -> None:
    fields = model_fields(super_plan(default=plan_format), "native")
    config = TransformerConfig(num_layers=2, hidden_size=64, num_attention_heads=4, **fields)
    assert (config.fp4, config.fp8) == (fp4, fp8)
    # Megatron-Core's default would keep the first layer in BF16 whenever this is on.
    assert not config.first_last_layers_bf16
    assert not config.fp4_param
    assert not config.fp8_param


def test_emulated_models_open_none_and_still_hear_of_first_micro_batches() -> None:
    config = TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, **model_fields(super_plan(), "emulated")
    )
    assert config.fp4 is config.fp8 is None
    # megatron/core/transformer/module.py, set_is_first_microbatch
    assert config.quant_recipe is not None
    assert get_quant_config_or_none("decoder.layers.0.mixer.in_proj", config.quant_recipe) is None


def test_settings_that_contradict_the_plan_are_refused() -> None:
    check_environment(NEUTRAL | {"PATH": "/bin", "NVTE_DEBUG": "1"})
    check_environment({})
    for name, value in (("NVTE_USE_FAST_MATH", "1"), ("NVTE_NVFP4_4OVER6", "all"), ("NVTE_NVFP4_DISABLE_RHT", "1")):
        with pytest.raises(UserError, match=f"{name}={value}"):
            check_environment({name: value})
