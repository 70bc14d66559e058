"""Transformer Engine's NVFP4 quantisers with some of their switches off, for ablations on Blackwell.

Megatron-Core builds ``NVFP4BlockScaling`` without arguments in a module's own context, so that anything but the
published combination needs a custom recipe.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformer_engine.pytorch.quantization import QuantizerRole
from transformer_engine.pytorch.tensor.nvfp4_tensor import NVFP4Quantizer

from nemotron3_megatron.precision.lowering.variants import VARIANTS
from nemotron3_megatron.precision.operands import Gemms


@dataclass(frozen=True, slots=True)
class NativeFactory:
    """What a custom recipe calls for each tensor of a module; compared by value, see ``emulation.te``."""

    gemms: Gemms

    def __call__(self, role: QuantizerRole | None) -> NVFP4Quantizer:
        """The quantiser of a tensor, as ``NVFP4BlockScalingRecipeState`` would make it with these switches."""
        tensor = role.tensor_type if role is not None else "output"
        rotated = self.gemms.wgrad[0].hadamard is not None and tensor != "weight"
        gradient = tensor in ("grad_output", "grad_input")
        return NVFP4Quantizer(
            with_rht=rotated,
            with_post_rht_amax=rotated,
            with_2d_quantization=tensor == "weight" and self.gemms.fprop[1].block == (16, 16),
            stochastic_rounding=gradient and self.gemms.dgrad[0].rounding == "stochastic",
        )


def __getattr__(name: str) -> NativeFactory:
    """The factory of a variant, for import paths such as ``...lowering.native.nvfp4_no_rht``."""
    if name in VARIANTS and name.startswith("nvfp4"):
        return NativeFactory(VARIANTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
