"""How much of an operand quantisation loses: what telemetry samples while a run trains.

All shares are of elements that are not zero *as quantised*: after the rotation where there is one, so that padding and
the zeros of an activation function count nowhere.

- flushed: the quantised value is 0.
- saturated: the magnitude exceeds the largest that the block's scale reaches, 6 * scale in NVFP4 and 448 * scale in
  MXFP8, so that the element was clamped. NVFP4 rounds a block's scale to the *nearest* E4M3 number, up to 1/16 too
  small, which clamps the block's largest elements; MXFP8 rounds it up, and saturates for no finite number. A block
  whose scale is 0 is flushed, not saturated.
- relative error: ||q - x|| / ||x||, Frobenius norms.

Scales are those of blocks that are not all zeros: E4M3 numbers (NVFP4, relative to the tensor's own scale), exponents
of two (MXFP8).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron3_megatron.precision.formats import e2m1, mxfp8, nvfp4
from nemotron3_megatron.precision.formats.hadamard import rotate
from nemotron3_megatron.precision.operands import Operand

Along = Literal["rows", "columns"]
"""Where blocks lie in a (T, K) matrix: along K, or along T."""

SAMPLED = 2**16
"""Elements of a tensor that are looked at: the standard deviation of a share of 10 % is then 0.12 %."""

SUMS = ("nonzero", "flushed", "saturated", "squared_error", "squared_norm", "blocks", "zero_scales", "subnormal_scales")
MAXIMA = ("amax", "scale_max", "minus_scale_min")

_CHUNK = 2**22
"""Elements rotated at a time where a whole tensor's amax is wanted: bounds memory."""
_CLAMPED = 1 + 2**-20
"""Beyond the largest value by more than float32 rounding explains."""
_E4M3_NORMAL = 2.0**-6


@dataclass(frozen=True, slots=True, eq=False)
class OperandStatistics:
    """Sums and maxima that add up over tensors, micro-batches and ranks."""

    sums: Tensor
    """(8,) float64, named by ``SUMS``."""
    maxima: Tensor
    """(3,) float64, named by ``MAXIMA``; -inf where there is nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """What the sums say; see the module's documentation. Scales are NaN where all blocks are zeros."""

    flush_to_zero: float
    saturation: float
    relative_error: float
    amax: float
    """Largest magnitude of the whole tensor, rotated where the operand is."""
    scale_min: float
    scale_max: float
    scale_zero: float
    """Share of block scales that are 0 (NVFP4): all of the block is flushed."""
    scale_subnormal: float
    """Share of block scales above 0 but below 2^-6, where E4M3 loses bits (NVFP4); of 2^-127, the least (MXFP8)."""


def summary(sums: Sequence[float], maxima: Sequence[float]) -> Summary:
    """Shares and ranges of ``SUMS`` with at least one non-zero element, and of ``MAXIMA``."""
    s, m = dict(zip(SUMS, sums, strict=True)), dict(zip(MAXIMA, maxima, strict=True))
    return Summary(
        flush_to_zero=s["flushed"] / s["nonzero"],
        saturation=s["saturated"] / s["nonzero"],
        relative_error=math.sqrt(s["squared_error"] / s["squared_norm"]) if s["squared_norm"] else math.nan,
        amax=m["amax"],
        scale_min=-m["minus_scale_min"],
        scale_max=m["scale_max"],
        scale_zero=s["zero_scales"] / s["blocks"],
        scale_subnormal=s["subnormal_scales"] / s["blocks"],
    )


def largest_magnitudes(parts: Sequence[Tensor], operand: Operand, along: Along) -> Tensor:
    """(P,) float32 amax of each part, after the operand's rotation: one or two passes over the tensors."""
    return torch.stack([_amax(_oriented(part, along), operand) for part in parts])


def operand_statistics(
    parts: Sequence[Tensor],
    operand: Operand,
    along: Along,
    *,
    amax: Tensor | None = None,
    limit: int = SAMPLED,
    generator: torch.Generator | None = None,
) -> OperandStatistics:
    """Quantise evenly spaced blocks as a GEMM's operand is quantised, and compare; results stay on the device.

    Larger tensors are sampled on a grid of whole blocks, rows and columns of blocks evenly spaced. Incomplete blocks
    count as completed with zeros.

    Args:
        parts: at least one (T, K) matrix on one device, none empty; each has an amax of its own (experts do).
        operand: a quantised one.
        along: where its blocks lie, and its rotation; blocks of (1, n) lie along T in ``"columns"``.
        amax: (P,) float32, where more than the part shares the tensor's scale; default: of each part.
        limit: about how many elements to look at, in all parts together.
        generator: on the parts' device, drawn from for stochastic rounding.

    Raises:
        ValueError: the operand is not quantised, or its generator is missing.
    """
    if operand.block is None:
        raise ValueError(f"{operand.format} has no blocks to look at")
    matrices = [_oriented(part.detach(), along) for part in parts]
    amax = largest_magnitudes(parts, operand, along) if amax is None else amax
    total = sum(matrix.numel() for matrix in matrices)
    samples = [_sample(matrix, operand, limit * matrix.numel() / total) for matrix in matrices]
    blocks = torch.cat(samples)
    if operand.format == "nvfp4":
        owner_amax = torch.cat([one.expand(len(sample), 1) for one, sample in zip(amax, samples, strict=True)])
        values, top, scales = _nvfp4(blocks, owner_amax, operand, generator)
    else:
        values, top, scales = _mxfp8(blocks)
    return _compare(blocks, values, top, scales, amax, operand)


def _oriented(x: Tensor, along: Along) -> Tensor:
    """A view whose blocks lie along the last dimension."""
    return x if along == "rows" else x.T


def _amax(x: Tensor, operand: Operand) -> Tensor:
    if operand.hadamard is None:
        return _norm(x.detach())
    size = operand.hadamard
    width = max(_CHUNK // len(x) // size, 1) * size
    chunks = (F.pad(chunk, (0, -chunk.shape[1] % size)) for chunk in x.detach().split(width, dim=1))
    return torch.stack([_norm(rotate(chunk)) for chunk in chunks]).amax()


def _norm(x: Tensor) -> Tensor:
    """() float32 largest magnitude, without a copy of ``x``."""
    largest: Tensor = torch.linalg.vector_norm(x, math.inf).float()
    return largest


def _sample(x: Tensor, operand: Operand, limit: float) -> Tensor:
    """(n, elements of a block) float32: whole blocks of (T, K), about ``limit`` elements, rotated."""
    assert operand.block is not None
    height, width = operand.block
    rows, columns = -(-x.shape[0] // height), -(-x.shape[1] // width)
    budget = max(int(limit) // (height * width), 1)
    some_rows = min(rows, max(budget // columns, math.isqrt(budget)))
    some_columns = min(columns, max(budget // some_rows, 1))
    down, across = _places(rows, some_rows, height, x.device), _places(columns, some_columns, width, x.device)
    tokens, features = x.shape
    picked = x[down.clamp(max=tokens - 1)[:, None], across.clamp(max=features - 1)]
    if tokens % height or features % width:
        picked = picked * ((down < tokens)[:, None] & (across < features))
    if operand.hadamard is not None:
        picked = rotate(picked)
    tiles = picked.float().view(some_rows, height, some_columns, width)
    return tiles.transpose(1, 2).reshape(-1, height * width)


def _places(blocks: int, some: int, size: int, device: torch.device) -> Tensor:
    """Indices of the elements of ``some`` evenly spaced blocks of ``size``."""
    first = torch.arange(some, device=device) * blocks // some * size
    return (first[:, None] + torch.arange(size, device=device)).flatten()


def _nvfp4(
    blocks: Tensor, amax: Tensor, operand: Operand, generator: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values (n, b), the largest that each block reaches and its scale (n, 1); amax is (n, 1)."""
    scales, encode = nvfp4.block_scales(blocks.abs().amax(1, keepdim=True), amax)
    scaled = blocks * encode
    if operand.rounding == "nearest":
        codes = e2m1.encode_nearest(scaled)
    elif generator is None:
        raise ValueError("stochastic rounding needs a generator")
    else:
        codes = e2m1.encode_stochastic(scaled, generator)
    decode = nvfp4.decode_scales(scales, amax)
    return e2m1.decode(codes) * decode, e2m1.MAX * decode, scales.float()


def _mxfp8(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As ``_nvfp4``; the scale is an exponent."""
    quantised = mxfp8.quantize(blocks)
    exponents = quantised.scales.int()
    top = mxfp8.E4M3_MAX * mxfp8.power_of_two(exponents)
    return quantised.dequantize(), top, (exponents - mxfp8.BIAS).float()


def _compare(
    blocks: Tensor, values: Tensor, top: Tensor, scales: Tensor, amax: Tensor, operand: Operand
) -> OperandStatistics:
    nonzero, live = blocks != 0, (blocks != 0).any(1, keepdim=True)
    flushed = nonzero & (values == 0)
    saturated = (blocks.abs() > top * _CLAMPED) & (top > 0)
    if operand.format == "nvfp4":
        zero, subnormal = live & (scales == 0), live & (scales > 0) & (scales < _E4M3_NORMAL)
    else:
        zero, subnormal = torch.zeros_like(live), live & (scales == -mxfp8.BIAS)
    wide = blocks.double()
    counts = [nonzero.sum(), flushed.sum(), saturated.sum()]
    squares = [(values - wide).square().sum(), wide.square().sum()]
    sums = torch.stack([x.double() for x in (*counts, *squares, live.sum(), zero.sum(), subnormal.sum())])
    extremes = [torch.where(live, sign * scales, -math.inf).amax() for sign in (1, -1)]
    return OperandStatistics(sums, torch.stack([amax.amax(), *extremes]).double())
