"""Experts' grouped linear with emulated operands around a grouped BF16 GEMM.

Transformer Engine quantises each expert's tensors apart, one call for each of five operands and every expert. Here one
call serves all experts of an operand (segments of :func:`nemotron3_megatron.precision.emulation.read.read`).

Shapes: T tokens sorted by expert, K inputs, N outputs, E local experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEGroupedLinear
from torch import Tensor, nn
from transformer_engine.pytorch import Fp8Padding, Fp8Unpadding
from transformer_engine.pytorch.cpp_extensions import general_grouped_gemm

from nemotron3_megatron.model.wgrad import placeholder
from nemotron3_megatron.precision.emulation.grouped import Weights, grouped_product, read_gradient, read_weights
from nemotron3_megatron.precision.emulation.read import read, segment_offsets
from nemotron3_megatron.precision.operands import Gemms


class EmulatedExperts:
    """What takes the place of a grouped linear's ``forward``: operands, and weights kept between micro-batches."""

    def __init__(self, module: TEGroupedLinear, gemms: Gemms) -> None:
        """Args: the module whose parameters and flags are used, and the operands of its GEMMs."""
        self.gemms = gemms
        self._module = module
        self._weights: Weights | None = None

    def _parameters(self) -> list[nn.Parameter]:
        return [self._module.get_parameter(f"weight{i}") for i in range(self._module.num_gemms)]

    def _read_weights(self, parameters: Sequence[nn.Parameter]) -> Weights:
        """Quantised at a step's first micro-batch, as Transformer Engine's modules do."""
        module = self._module
        if self._weights is None or module.is_first_microbatch or module.disable_parameter_transpose_cache:
            self._weights = read_weights(parameters, self.gemms)
        module.is_first_microbatch = False
        return self._weights


class EmulatedDeviceCountsForward(EmulatedExperts):
    """For experts whose token counts stay on the GPU (``model/device_counts.py``)."""

    def __call__(self, x: Tensor, ends: Tensor) -> tuple[Tensor, None]:
        """x (T, K), rows sorted by expert, and cumulative counts (E,) int32 -> ((T, N), None)."""
        parameters = self._parameters()
        weights, fused = self._read_weights(parameters), self._module.fuse_wgrad_accumulation
        return grouped_product(x, ends, self.gemms, weights, parameters, fused=fused), None


class EmulatedGroupedForward(EmulatedExperts):
    """With Transformer Engine's grouped GEMM, which takes counts from the CPU."""

    def __init__(self, module: TEGroupedLinear, gemms: Gemms) -> None:
        """See :class:`EmulatedExperts`."""
        super().__init__(module, gemms)
        block = gemms.wgrad[0].block
        assert block is not None
        # wgrad divides each expert's tokens into blocks; zeros change no amax and no sum. (Native kernels pad to 128.)
        self._pad = Fp8Padding(module.num_gemms, block[-1])
        self._unpad = Fp8Unpadding(module.num_gemms, block[-1])

    def __call__(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        """x (T, K), rows sorted by expert, ``m_splits`` tokens for each -> ((T, N), None)."""
        parameters = self._parameters()
        weights = self._read_weights(parameters)
        padded, counts = self._pad(x, m_splits)
        fused = self._module.fuse_wgrad_accumulation
        arguments = (padded.contiguous(), self.gemms, counts, weights, fused, *parameters)
        y: Tensor = _GroupedProduct.apply(*arguments)  # type: ignore[no-untyped-call]
        unpadded: Tensor = self._unpad(y, m_splits)
        return unpadded, None


class _GroupedProduct(torch.autograd.Function):
    """Y = X Wᵀ by expert; dX = dY W; dW = dYᵀ X."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gemms: Gemms, counts: list[int], weights: Weights, fused: bool, *parameters: nn.Parameter
    ) -> Tensor:
        trains = any(ctx.needs_input_grad[5:])
        offsets = segment_offsets(counts, x.device)
        rows, columns = read(x, gemms.fprop[0], gemms.wgrad[1] if trains else None, offsets=offsets, fold=True)
        assert rows is not None
        ctx.save_for_backward(None if columns is None else columns.values, weights[1], offsets)
        ctx.gemms, ctx.counts, ctx.fused, ctx.parameters = gemms, counts, fused, parameters
        y = x.new_empty(x.shape[0], parameters[0].shape[0])
        _grouped_gemm(_chunks(weights[0], parameters), rows.values.split(counts), [y], "TN", m_splits=counts)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dy = gradients[0].contiguous()
        columns, weights, offsets = ctx.saved_tensors
        gemms, counts, parameters = ctx.gemms, ctx.counts, ctx.parameters
        rows_dy, columns_dy = read_gradient(
            dy, gemms, offsets, for_input=ctx.needs_input_grad[0], for_weights=columns is not None
        )
        dx: Tensor | None = None
        dw: Sequence[Tensor | None] = [None] * len(parameters)
        if rows_dy is not None:
            dx = dy.new_empty(dy.shape[0], weights.shape[1])
            dys = rows_dy.values.split(counts)
            _grouped_gemm(_chunks(weights, parameters), dys, [dx], "NN", m_splits=counts, grad=True)
        if columns_dy is not None:
            xs, dys = columns.split(counts), columns_dy.values.split(counts)
            dw = _weight_gradients(xs, dys, parameters, counts, ctx.fused)
        return dx, None, None, None, None, *dw


def _weight_gradients(
    xs: Sequence[Tensor], dys: Sequence[Tensor], parameters: Sequence[Any], counts: list[int], fused: bool
) -> list[Tensor]:
    """Each expert's dW, or with ``fused`` placeholders of those added to ``main_grad``."""
    if not fused:
        packed = xs[0].new_empty(len(parameters), *parameters[0].shape)
        _grouped_gemm(xs, dys, list(packed), "NT", m_splits=counts, grad=True)
        return list(packed)
    # Added at every micro-batch, for Megatron-Core clears the buffer: overwriting it at the first, as Transformer
    # Engine does, would lose the share of a module that runs twice in a micro-batch (MTP's repeated block).
    _grouped_gemm(xs, dys, [p.main_grad for p in parameters], "NT", m_splits=counts, grad=True, accumulate=True)
    return [placeholder(parameter) for parameter in parameters]


def _grouped_gemm(a: Sequence[Tensor], b: Sequence[Tensor], out: list[Tensor], layout: str, **options: Any) -> None:
    """One GEMM an expert into ``out``, which holds one tensor for all of them or one for each."""
    single = layout != "NT"
    general_grouped_gemm(
        list(a), list(b), out, [None] * len(a), out[0].dtype, layout=layout, single_output=single, **options
    )


def _chunks(weights: Tensor, parameters: Sequence[nn.Parameter]) -> Sequence[Tensor]:
    experts: tuple[Tensor, ...] = weights.split(parameters[0].shape[0])
    return experts
