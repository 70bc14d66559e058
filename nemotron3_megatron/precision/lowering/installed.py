"""What the modules of the te spec quantise: read off Transformer Engine's own objects, not off the plan."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from megatron.core.extensions.transformer_engine import _get_fp8_autocast_for_quant_params
from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from torch import nn
from transformer_engine.common.recipe import Recipe
from transformer_engine.pytorch.constants import DType
from transformer_engine.pytorch.quantization import FP8GlobalStateManager, RecipeState
from transformer_engine.pytorch.quantized_tensor import Quantizer
from transformer_engine.pytorch.tensor.identity_tensor import IdentityQuantizer
from transformer_engine.pytorch.tensor.mxfp8_tensor import MXFP8Quantizer
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

from nemotron3_megatron.precision.emulation.te import OperandQuantizer
from nemotron3_megatron.precision.emulation.te_grouped import EmulatedExperts
from nemotron3_megatron.precision.operands import Gemms, Operand, Tensor


def installed_gemms(module: nn.Module) -> Gemms | None:
    """The operands that a module will quantise in training; None: none.

    Opens the contexts that the stack and the module itself will open, and makes quantisers as they will.

    Raises:
        RuntimeError: the module would do one thing inside the stack's context and another outside of it.
    """
    replaced = vars(module).get("forward")
    if isinstance(replaced, EmulatedExperts):
        return replaced.gemms
    inside, outside = (_in_context(module, context) for context in (_stack_context(module), nullcontext()))
    if inside != outside:
        raise RuntimeError(f"{type(module).__name__}: {inside} inside a quantised context, {outside} outside")
    return inside


def used_gemms(module: Any) -> Gemms | None:
    """The operands that a module quantised in its latest forward and backward pass; None: none."""
    replaced = vars(module).get("forward")
    if isinstance(replaced, EmulatedExperts):
        return replaced.gemms
    return _gemms(module.quantizers["scaling_fwd"], module.quantizers["scaling_bwd"]) if module.fp8 else None


def _stack_context(module: Any) -> Any:
    """What ``HybridStack`` opens around its layers."""
    config = module.config
    if config.fp8:
        return get_fp8_context(config)
    return get_fp4_context(config)


def _in_context(module: Any, context: Any) -> Gemms | None:
    with context, _get_fp8_autocast_for_quant_params(module.te_quant_params, True):
        if not FP8GlobalStateManager.is_fp8_enabled():
            return None
        recipe = FP8GlobalStateManager.get_fp8_recipe()
    return _gemms(_quantizers(module, recipe, forward=True), _quantizers(module, recipe, forward=False))


def _quantizers(module: Any, recipe: Recipe, *, forward: bool) -> Sequence[Quantizer]:
    """Of input, weight and output, or of the gradients of output and input (of one expert)."""
    count = 3 if forward else 2
    roles = module.get_quantizer_roles(fwd=forward, num_quantizers=count)
    mode = "forward" if forward else "backward"
    quantizers: Sequence[Quantizer] = RecipeState.create(
        recipe, mode=mode, num_quantizers=count, roles=roles
    ).make_quantizers()
    return quantizers


def _gemms(forward: Sequence[Quantizer], backward: Sequence[Quantizer]) -> Gemms | None:
    x, w, dy = _directions(forward[0], "input"), _directions(forward[1], "weight"), _directions(backward[0], "gradient")
    gemms = Gemms(fprop=(x[0], w[0]), dgrad=(dy[0], w[1]), wgrad=(dy[1], x[1]))
    operands = (*gemms.fprop, *gemms.dgrad, *gemms.wgrad)
    return None if all(operand.format == "bf16" for operand in operands) else gemms


def _directions(quantizer: Quantizer, tensor: Tensor) -> tuple[Operand, Operand]:
    """A tensor along rows and along columns."""
    if isinstance(quantizer, OperandQuantizer):
        return quantizer.rows, quantizer.columns
    if isinstance(quantizer, NVFP4Quantizer):
        return _nvfp4(quantizer, tensor, rotated=False), _nvfp4(quantizer, tensor, rotated=quantizer.with_rht)
    if (
        isinstance(quantizer, MXFP8Quantizer)
        and not quantizer.with_2d_quantization
        and quantizer.dtype == DType.kFloat8E4M3
    ):
        operand = Operand(tensor=tensor, format="mxfp8", block=(1, 32))
        return operand, operand
    if type(quantizer) is IdentityQuantizer:
        operand = Operand(tensor=tensor, format="bf16")
        return operand, operand
    raise RuntimeError(f"no precision plan describes {quantizer}")


def _nvfp4(quantizer: NVFP4Quantizer, tensor: Tensor, *, rotated: bool) -> Operand:
    if quantizer.row_scaled_nvfp4 or quantizer.nvfp4_use_4over6:
        raise RuntimeError(f"no precision plan describes {quantizer}")
    return Operand(
        tensor=tensor,
        format="nvfp4",
        block=(16, 16) if quantizer.with_2d_quantization else (1, 16),
        rounding="stochastic" if quantizer.stochastic_rounding else "nearest",
        hadamard=16 if rotated else None,
    )
