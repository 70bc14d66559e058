"""Products of experts with emulated operands, without token counts on the CPU.

Blocks of wgrad lie along tokens, so each expert's rows are padded with zeros to whole blocks. How many that makes only
the device knows; the padded matrix has room for the most there can be. Rows left over are zeros as well and count as
the last expert's: they change no amax and no sum, and every row is some expert's, hence written by each product.

Shapes: T rows sorted by expert, P padded rows, K inputs, N outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.model.wgrad import add_weight_gradients, placeholder
from nemotron3_megatron.precision.emulation.read import Read, default_generator, read
from nemotron3_megatron.precision.operands import Gemms

Weights = tuple[Tensor, Tensor]
"""All experts' weights (E * N, K), as fprop and as dgrad read them."""


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """Where rows go when each expert's are padded to whole blocks."""

    places: Tensor
    """(T,) int64: the padded row of each row."""
    offsets: Tensor
    """(E + 1,) int32: the padded rows of each expert, from 0 to P."""
    rows: int
    """P."""

    def pad(self, x: Tensor) -> Tensor:
        """(T, K) -> (P, K)."""
        return x.new_zeros(self.rows, x.shape[1]).index_copy_(0, self.places, x)

    def unpad(self, padded: Tensor) -> Tensor:
        """(P, K) -> (T, K)."""
        return padded.index_select(0, self.places)


def padding(ends: Tensor, tokens: int, block: int) -> Padding:
    """Places of ``tokens`` rows in blocks of ``block``.

    Args:
        ends: (E,) int32, cumulative counts; the last is ``tokens``.
        tokens: T.
        block: rows of a block.
    """
    experts = len(ends)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    # Every expert wastes less than a block.
    rows = (-(-tokens // block) + experts) * block
    blocks = (ends - starts + (block - 1)).div(block, rounding_mode="floor")
    padded_ends = blocks.cumsum(0, dtype=torch.int32) * block
    last = torch.full_like(ends[-1:], rows)
    offsets = torch.cat([ends.new_zeros(1), padded_ends[:-1], last])
    row = torch.arange(tokens, dtype=torch.int32, device=ends.device)
    # The experts that end at or before a row come before its own.
    expert = torch.searchsorted(ends, row, right=True)
    return Padding(row + (offsets[:-1] - starts)[expert].long(), offsets, rows)


def read_weights(parameters: Sequence[Tensor], gemms: Gemms) -> Weights:
    """Experts' weights (N, K) each, quantised apart from each other."""
    whole = torch.cat([parameter.detach() for parameter in parameters])
    height = parameters[0].shape[0]
    offsets = torch.arange(0, len(whole) + 1, height, dtype=torch.int32, device=whole.device)
    forward, backward = gemms.fprop[1], gemms.dgrad[1]
    both = read(whole, forward, None if forward.is_square else backward, offsets=offsets, fold=True)
    along_rows, along_columns = both[0], both[1] or both[0]
    assert along_rows is not None
    assert along_columns is not None
    return along_rows.values, along_columns.values


def read_gradient(
    dy: Tensor, gemms: Gemms, offsets: Tensor, *, for_input: bool, for_weights: bool
) -> tuple[Read | None, Read | None]:
    """The output's gradient (T, N) as dgrad and as wgrad read it, where it is wanted."""
    return read(
        dy,
        gemms.dgrad[0] if for_input else None,
        gemms.wgrad[0] if for_weights else None,
        offsets=offsets,
        generator=default_generator(dy.device),
        fold=True,
    )


def grouped_product(
    x: Tensor, ends: Tensor, gemms: Gemms, weights: Weights, parameters: Sequence[Tensor], *, fused: bool
) -> Tensor:
    """Y = X Wᵀ by expert, differentiable in ``x`` and ``parameters``.

    Args:
        x: (T, K), rows sorted by expert; on a GPU in BF16.
        ends: (E,) int32, cumulative counts, on the same device.
        gemms: the operands of the products.
        weights: from :func:`read_weights`.
        parameters: (N, K) each; with ``fused`` their ``main_grad`` receive the gradients.
        fused: see :mod:`nemotron3_megatron.model.wgrad`.

    Returns:
        (T, N).
    """
    y: Tensor = _GroupedProduct.apply(x, ends, gemms, weights, fused, *parameters)  # type: ignore[no-untyped-call]
    return y


class _GroupedProduct(torch.autograd.Function):
    """Y = X Wᵀ by expert; dX = dY W; dW = dYᵀ X."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, ends: Tensor, gemms: Gemms, weights: Weights, fused: bool, *parameters: Tensor
    ) -> Tensor:
        trains = any(ctx.needs_input_grad[5:])
        block = gemms.wgrad[0].block
        assert block is not None
        padded = padding(ends, x.shape[0], block[-1])
        columns_of = gemms.wgrad[1] if trains else None
        rows, columns = read(padded.pad(x), gemms.fprop[0], columns_of, offsets=padded.offsets, fold=True)
        assert rows is not None
        ctx.save_for_backward(None if columns is None else columns.values, weights[1], padded.places, padded.offsets)
        ctx.gemms, ctx.fused, ctx.parameters, ctx.rows = gemms, fused, parameters, padded.rows
        stacked = weights[0].view(len(parameters), *parameters[0].shape)
        return padded.unpad(torch._grouped_mm(rows.values, stacked.transpose(1, 2), offs=padded.offsets[1:]))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        columns, weights, places, offsets = ctx.saved_tensors
        gemms, parameters = ctx.gemms, ctx.parameters
        padded = Padding(places, offsets, ctx.rows)
        dy = padded.pad(gradients[0])
        rows_dy, columns_dy = read_gradient(
            dy, gemms, offsets, for_input=ctx.needs_input_grad[0], for_weights=columns is not None
        )
        dx: Tensor | None = None
        dw: Sequence[Tensor | None] = [None] * len(parameters)
        if rows_dy is not None:
            stacked = weights.view(len(parameters), *parameters[0].shape)
            dx = padded.unpad(torch._grouped_mm(rows_dy.values, stacked, offs=offsets[1:]))
        if columns_dy is not None:
            product = torch._grouped_mm(columns_dy.values.t(), columns, offs=offsets[1:])
            if ctx.fused:
                add_weight_gradients(product, parameters)
                dw = [placeholder(parameter) for parameter in parameters]
            else:
                dw = product.unbind()
        return dx, None, None, None, None, *dw
