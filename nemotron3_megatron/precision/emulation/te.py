"""Transformer Engine's linears with emulated operands: Hopper.

A module runs under a ``CustomRecipe``, which asks for a quantiser of each tensor. Those here quantise and dequantise;
the tensors they hold are ordinary ones, so that Transformer Engine multiplies them by its BF16 GEMMs, gathers, scatters
and accumulates gradients as in BF16. Nothing in Transformer Engine is patched. (Read and tested against 2.20.2; its
documentation calls custom recipes, hybrid and identity quantisers experimental.)

The scale of a whole NVFP4 tensor is multiplied into its values, which BF16 then rounds to half a unit in the last
place: the one difference from a product of codes.
"""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformer_engine.pytorch.quantization import QuantizerRole
from transformer_engine.pytorch.tensor.hybrid_tensor import HybridQuantizedTensor, HybridQuantizer
from transformer_engine.pytorch.tensor.identity_tensor import IdentityQuantizer, IdentityTensor
from transformer_engine.pytorch.tensor.storage.hybrid_tensor_storage import HybridQuantizedTensorStorage
from transformer_engine.pytorch.tensor.storage.identity_tensor_storage import IdentityTensorStorage

from nemotron3_megatron.precision.emulation.read import default_generator, read
from nemotron3_megatron.precision.lowering.variants import VARIANTS
from nemotron3_megatron.precision.operands import Gemms, Operand


class Held(IdentityQuantizer):  # type: ignore[misc]
    """One direction of an operand: quantised by the whole operand's quantiser, and only kept."""

    def quantize_impl(self, tensor: Tensor) -> Any:
        raise NotImplementedError("both directions are quantised at once; grouped linears have a product of their own")

    def copy(self) -> Held:
        """Itself: there is no state."""
        return self


class OperandQuantizer(HybridQuantizer):  # type: ignore[misc]
    """Quantises a tensor along rows and columns in one pass over it."""

    custom = True
    """Under sequence parallelism Transformer Engine then gathers tokens before it quantises them. What else it does, to
    quantise shards and gather those, would round and rotate twice: gathered in pieces, a held tensor is quantised anew.
    One amax of all tokens is what the native kernels have too (they reduce it over the tensor parallel group)."""

    def __init__(self, rows: Operand, columns: Operand) -> None:
        """``rows``: as the GEMM reads it that reduces over the last dimension; ``columns``: over tokens or outputs."""
        super().__init__(rowwise_quantizer=Held(), columnwise_quantizer=Held())
        self.rows = rows
        self.columns = columns

    def copy(self) -> OperandQuantizer:
        """Transformer Engine keeps a copy with each tensor, for the directions in use may change."""
        return copy(self)

    def quantize_impl(self, tensor: Tensor) -> Any:
        """tensor (..., K) -> what GEMMs read of it, in the directions in use."""
        rows, columns = self._read(tensor, rows=self.rowwise_usage, columns=self.columnwise_usage)
        held = {
            "rowwise_storage": None if rows is None else _held(rows, self.rowwise_quantizer, self.internal),
            "columnwise_storage": None if columns is None else _held(columns, self.columnwise_quantizer, self.internal),
            "quantizer": self,
        }
        if self.internal:
            return HybridQuantizedTensorStorage(**held, fake_dtype=tensor.dtype)
        return HybridQuantizedTensor(shape=tensor.shape, dtype=tensor.dtype, device=tensor.device, **held)

    def update_quantized(self, src: Tensor, dst: Any, *, noop_flag: Tensor | None = None) -> Any:
        """Replace what ``dst``, a weight kept between micro-batches, holds."""
        if noop_flag is not None:
            raise NotImplementedError("emulation does not run in CUDA graphs")
        held = (dst.rowwise_sub_storage, dst.columnwise_sub_storage)
        values = self._read(src, rows=held[0] is not None, columns=held[1] is not None)
        for storage, value in zip(held, values, strict=True):
            if storage is not None:
                storage._hp_data = value
        return dst

    def is_requantization_safe(self) -> bool:
        """Whether quantising again gives the same."""
        return "stochastic" not in (self.rows.rounding, self.columns.rounding)

    def _read(self, tensor: Tensor, *, rows: bool, columns: bool) -> tuple[Tensor | None, Tensor | None]:
        flat = tensor.detach().reshape(-1, tensor.shape[-1]).contiguous()
        if self.rows.is_square:
            whole, _ = read(flat, self.rows, None, fold=True)
            assert whole is not None
            values = whole.values.view(tensor.shape)
            return values if rows else None, values if columns else None
        both = read(
            flat,
            self.rows if rows else None,
            self.columns if columns else None,
            generator=default_generator(tensor.device),
            fold=True,
        )
        along_rows, along_columns = (None if one is None else one.values.view(tensor.shape) for one in both)
        return along_rows, along_columns


def _held(values: Tensor, quantizer: Held, internal: bool) -> Any:
    """``values`` as Transformer Engine passes them on; as a tensor of torch's unless they stay within a module."""
    if internal:
        return IdentityTensorStorage(hp_data=values, fake_dtype=values.dtype, quantizer=quantizer)
    shape, dtype, device = values.shape, values.dtype, values.device
    return IdentityTensor(shape, dtype, hp_data=values, quantizer=quantizer, requires_grad=False, device=device)


@dataclass(frozen=True, slots=True)
class QuantizerFactory:
    """What a custom recipe calls for each tensor of a module.

    Megatron-Core makes a recipe anew in every forward pass; quantisers and the weights they keep outlive it because
    recipes, hence factories, are compared by value.
    """

    gemms: Gemms

    def __call__(self, role: QuantizerRole | None) -> OperandQuantizer | IdentityQuantizer:
        """The quantiser of a tensor; outputs and input gradients stay as they are."""
        fprop, dgrad, wgrad = self.gemms.fprop, self.gemms.dgrad, self.gemms.wgrad
        match role.tensor_type if role is not None else "":
            case "input":
                return OperandQuantizer(fprop[0], wgrad[1])
            case "weight":
                return OperandQuantizer(fprop[1], dgrad[1])
            case "grad_output":
                return OperandQuantizer(dgrad[0], wgrad[0])
            case _:
                return IdentityQuantizer()


def __getattr__(name: str) -> QuantizerFactory:
    """The factory of a variant, for import paths such as ``...emulation.te.nvfp4_no_rht``."""
    if name in VARIANTS:
        return QuantizerFactory(VARIANTS[name])
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
