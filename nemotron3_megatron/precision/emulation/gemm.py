"""The three GEMMs of a linear on quantised operands, as autograd sees them.

Shapes: T tokens, K inputs, N outputs, E experts. ``E = 1`` is a dense linear.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.precision.emulation.read import Read, read, segment_offsets
from nemotron3_megatron.precision.operands import Gemms


class EmulatedGemm:
    """``x @ weight.T`` with quantised operands in fprop, dgrad and wgrad."""

    def __init__(self, gemms: Gemms, generator: torch.Generator) -> None:
        """Args: operands of the GEMMs, and the device's generator for stochastic rounding."""
        self.gemms = gemms
        self._generator = generator

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., K) and weight (N, K) -> (..., N).

        The amax of ``x`` is that of all tokens given: gather sequence-parallel shards first, which is what Transformer
        Engine's reduction of amax over the tensor parallel group amounts to.
        """
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = _product(flat, self.gemms, self._generator, None, (weight,))
        return y.view(*x.shape[:-1], weight.shape[0])


class EmulatedGroupedGemm:
    """One product for each expert; each expert's tokens and weight have an amax of their own."""

    def __init__(self, gemms: Gemms, generator: torch.Generator) -> None:
        """Args: operands of the GEMMs, and the device's generator for stochastic rounding."""
        self.gemms = gemms
        self._generator = generator

    def __call__(self, x: Tensor, weights: Sequence[Tensor], tokens_per_expert: Sequence[int]) -> Tensor:
        """x (T, K), rows sorted by expert, and E weights (N, K) -> (T, N)."""
        block = self.gemms.wgrad[0].block
        assert block is not None
        counts = [-(-count // block[-1]) * block[-1] for count in tokens_per_expert]
        rows = None if counts == list(tokens_per_expert) else _padded_rows(tokens_per_expert, counts, x.device)
        # Zeros change no amax and no sum; Transformer Engine's callers pad for its kernels in the same way.
        padded = x if rows is None else x.new_zeros(sum(counts), x.shape[1]).index_copy(0, rows, x)
        y = _product(padded.contiguous(), self.gemms, self._generator, counts, weights)
        return y if rows is None else y[rows]


def _padded_rows(counts: Sequence[int], padded: Sequence[int], device: torch.device) -> Tensor:
    """(T,) place of each token once every expert's tokens are followed by padding."""
    starts = [0, *accumulate(padded)]
    ranges = [torch.arange(start, start + count) for start, count in zip(starts, counts, strict=False)]
    return torch.cat(ranges).to(device)


def _product(
    x: Tensor, gemms: Gemms, generator: torch.Generator, counts: list[int] | None, weights: Sequence[Tensor]
) -> Tensor:
    # Where no weight gradient will be asked for, X is not read along tokens, which may then be any number.
    trains = torch.is_grad_enabled() and any(weight.requires_grad for weight in weights)
    y: Tensor = _Product.apply(x, gemms, generator, counts, trains, *weights)  # type: ignore[no-untyped-call]
    return y


class _Product(torch.autograd.Function):
    """Y = X Wᵀ by expert; dX = dY W; dW = dYᵀ X."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gemms: Gemms,
        generator: torch.Generator,
        counts: list[int] | None,
        trains: bool,
        *weights: Tensor,
    ) -> Tensor:
        offsets = None if counts is None else segment_offsets(counts, x.device)
        rows, columns = read(x, gemms.fprop[0], gemms.wgrad[1] if trains else None, offsets=offsets)
        forward, backward = _read_weights(weights, gemms)
        assert rows is not None
        ctx.gemms, ctx.generator, ctx.counts = gemms, generator, counts
        ctx.weights_like = [(w.shape, w.dtype) for w in weights]
        _save(ctx, columns, backward)
        n = weights[0].shape[0]
        return torch.cat(_by_expert(lambda a, b: (a, b.T), rows, counts, forward, [n] * len(weights), x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        dy = gradients[0].contiguous()
        gemms, counts = ctx.gemms, ctx.counts
        columns, weights = _saved(ctx)
        offsets = None if counts is None else segment_offsets(counts, dy.device)
        dy_rows, dy_columns = read(
            dy,
            gemms.dgrad[0] if ctx.needs_input_grad[0] else None,
            gemms.wgrad[0] if columns is not None else None,
            offsets=offsets,
            generator=ctx.generator,
        )
        dx: Tensor | None = None
        dw: Sequence[Tensor | None] = [None] * len(ctx.weights_like)
        if dy_rows is not None:
            heights = [shape[0] for shape, _ in ctx.weights_like]
            dx = torch.cat(_by_expert(lambda a, b: (a, b), dy_rows, counts, weights, heights, dy.dtype))
        if dy_columns is not None and columns is not None:
            dtype = ctx.weights_like[0][1]
            dw = _by_expert(lambda a, b: (a.T, b), dy_columns, counts, columns, counts, dtype)
        return dx, None, None, None, None, *dw


def _read_weights(weights: Sequence[Tensor], gemms: Gemms) -> tuple[Read, Read]:
    """The experts' weights, one below the other, as fprop and as dgrad read them."""
    whole = weights[0].detach() if len(weights) == 1 else torch.cat([weight.detach() for weight in weights])
    offsets = None if len(weights) == 1 else segment_offsets([weight.shape[0] for weight in weights], whole.device)
    forward, backward = gemms.fprop[1], gemms.dgrad[1]
    rows, columns = read(whole, forward, None if forward.is_square else backward, offsets=offsets)
    assert rows is not None
    return rows, columns or rows


def _by_expert(
    oriented: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    left: Read,
    left_counts: Sequence[int] | None,
    right: Read,
    right_counts: Sequence[int] | None,
    dtype: torch.dtype,
) -> list[Tensor]:
    """One product an expert, summed in float32, scaled, then rounded to ``dtype``."""
    lefts = [left.values] if left_counts is None else left.values.split(list(left_counts))
    rights = [right.values] if right_counts is None else right.values.split(list(right_counts))
    scales = None if left.scale is None or right.scale is None else left.scale * right.scale
    products = (_float32_product(*oriented(a, b)) for a, b in zip(lefts, rights, strict=True))
    return [(p if scales is None else p.mul_(scales[i])).to(dtype) for i, p in enumerate(products)]


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """Values as quantised are exact in BF16, so that tensor cores lose nothing before the float32 sum."""
    if a.is_cuda and a.dtype == torch.bfloat16:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _save(ctx: Any, x: Read | None, weight: Read) -> None:
    """``x`` is None where the weight takes no gradient."""
    values, scale = (None, None) if x is None else (x.values, x.scale)
    ctx.save_for_backward(values, scale, weight.values, weight.scale)


def _saved(ctx: Any) -> tuple[Read | None, Read]:
    values, scale, weight_values, weight_scale = ctx.saved_tensors
    return None if values is None else Read(values, scale), Read(weight_values, weight_scale)
