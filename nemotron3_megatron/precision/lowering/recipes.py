"""Rows of a precision plan as Megatron-Core's per-module recipes; standard library and YAML only.

Both overrides are always on, so that a module does as its row says whatever context the stack opens around it: by
itself an override acts only inside a quantised context, and none is open around ``eh_proj`` or in emulation, while
MTP's inner stack opens one though its layers are to stay in BF16.
"""

from __future__ import annotations

from typing import Any, Literal

import yaml

from nemotron3_megatron.precision.lowering.variants import variant_name
from nemotron3_megatron.precision.operands import Gemms
from nemotron3_megatron.precision.plan import PrecisionPlan
from nemotron3_megatron.precision.policy import Format

Recipe = dict[str, str | bool]
"""Fields of ``TEQuantizationRecipe`` (megatron/core/extensions/transformer_engine.py)."""

FACTORIES = {
    "native": "nemotron3_megatron.precision.lowering.native",
    "emulated": "nemotron3_megatron.precision.emulation.te",
}
"""Modules that hold a quantiser factory for each variant."""

_OVERRIDES: Recipe = {"override_quantized_autocast": True, "override_nonquantized_autocast": True}
_FIELD: dict[Format, str] = {"nvfp4": "fp4_quantization_recipe", "mxfp8": "fp8_quantization_recipe"}


def module_recipe(number_format: Format, gemms: Gemms, backend: Literal["native", "emulated"]) -> Recipe:
    """What a module's own context shall be."""
    if number_format == "bf16":
        return _OVERRIDES.copy()
    name, field = variant_name(gemms), _FIELD[number_format]
    if backend == "native" and name == number_format:  # as Transformer Engine's recipe does it by default
        return {field: name, **_OVERRIDES}
    return {field: "custom", "custom_recipe_factory": f"{FACTORIES[backend]}.{name}", **_OVERRIDES}


def module_config(recipe: Recipe) -> dict[str, Any]:
    """A recipe as ``finish_init`` and the file of per-module recipes take it; evaluation does as training."""
    return {"transformer_engine_config_type": "TEQuantizationParams", "training_recipe": recipe}


def model_fields(plan: PrecisionPlan, backend: Literal["native", "emulated"]) -> dict[str, Any]:
    """Fields of ``TransformerConfig`` for a model of the te spec that is lowered afterwards.

    Native: the stack's own context, which every module overrides, is what makes the experts pad each expert's tokens
    with zeros (to 128 rows for NVFP4, 32 for MXFP8). Padding by the router (``moe_router_padding_for_quantization``)
    would route further tokens instead, which then count in the experts' amax. No layer is left out of that context:
    the padding keeps the alignment of the context it first ran in, and BF16 layers have their rows in the plan.

    Emulated: a list of recipes without any, because Megatron-Core tells modules that a step begins, and that kept
    weights are stale, only if it finds one of ``fp4``, ``fp8`` and ``quant_recipe`` (``set_is_first_microbatch``).
    """
    if backend == "emulated":
        from megatron.core.quantization.quant_config import RecipeConfig

        return {"quant_recipe": RecipeConfig([], {})}
    if any(row.format == "nvfp4" for row in plan.rows):
        return {"fp4": "e2m1", "fp4_recipe": "nvfp4", "first_last_layers_bf16": False}
    return {"fp8": "e4m3", "fp8_recipe": "mxfp8", "first_last_layers_bf16": False}


def megatron_yaml(plan: PrecisionPlan) -> str:
    """The plan as a file for Megatron-LM's ``--te-precision-config-file``: a record, and a way to run without us.

    Megatron-Core matches names with layers counted from a pipeline stage's first one, so the file holds without
    pipeline parallelism only; we install recipes by global names.
    """
    recipes = {row.module: module_recipe(row.format, row.gemms, "native") for row in plan.rows}
    names = {row.module: row.format if row.format == "bf16" else variant_name(row.gemms) for row in plan.rows}
    configs = {names[module]: module_config(recipe) for module, recipe in recipes.items()}
    matchers = {
        module: {"type": "glob", "pattern": module, "config": name, "enabled": True} for module, name in names.items()
    }
    flags = ", ".join(f"{name}={value}" for name, value in model_fields(plan, "native").items())
    header = f"# Precision of every module, for pipeline_model_parallel_size=1. TransformerConfig beside it: {flags}\n"
    body: str = yaml.safe_dump({"configs": configs, "matchers": matchers}, sort_keys=False)
    return header + body
