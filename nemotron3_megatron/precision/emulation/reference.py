"""``read`` in torch, on any device: the formats' arithmetic without codes, which a CPU trains with.

Equal to ``precision.formats`` value by value (rotations of float32, and sums across more than 12 binades, to
rounding: see ``formats.hadamard.rotate``).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from nemotron3_megatron.precision.emulation.read import Read
from nemotron3_megatron.precision.formats import e2m1, hadamard, mxfp8, nvfp4
from nemotron3_megatron.precision.operands import Operand

Along = Literal["rows", "columns"]

_MANTISSA_BITS = 23
_EXPONENT_MASK = 0x7F800000
_RANDOM_BITS = 16
"""Probabilities of stochastic rounding are multiples of 2^-16 (Transformer Engine's of 2^-8)."""


def read(
    x: Tensor,
    rows: Operand | None,
    columns: Operand | None,
    *,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    fold: bool = False,
) -> tuple[Read | None, Read | None]:
    """See :func:`nemotron3_megatron.precision.emulation.read.read`."""
    parts = [x] if offsets is None else x.split(offsets.diff().tolist())

    def along(direction: Along, operand: Operand | None) -> Read | None:
        return None if operand is None else _join([_read(p, operand, direction, generator, fold) for p in parts])

    return along("rows", rows), along("columns", columns)


def _join(parts: list[Read]) -> Read:
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    return Read(torch.cat([part.values for part in parts]), torch.cat(scales) if scales else None)


def _read(x: Tensor, operand: Operand, along: Along, generator: torch.Generator | None, fold: bool) -> Read:
    if x.numel() == 0:
        scale = None if fold or operand.format == "mxfp8" else x.new_zeros(1, dtype=torch.float32)
        return Read(x, scale)
    blocks, dims = _blocks(x.detach(), operand, along)
    if operand.format == "mxfp8":
        return Read(_mxfp8(blocks, dims).to(x.dtype).view(x.shape), None)
    if operand.format != "nvfp4":
        raise ValueError(f"{operand.format} is not a quantised format")
    if operand.hadamard:
        matrix = torch.tensor(hadamard.MATRIX, dtype=torch.float32, device=x.device)
        blocks = (matrix.T @ blocks).to(x.dtype).float()
    block_amax = blocks.abs().amax(dims, keepdim=True)
    amax = block_amax.amax()
    scales, encode = nvfp4.block_scales(block_amax, amax)
    scaled = (blocks * encode).clamp_(-e2m1.MAX, e2m1.MAX)
    stochastic = operand.rounding == "stochastic"
    values = _round_stochastic(scaled, generator) if stochastic else _round_nearest(scaled)
    decode = nvfp4.decode_scales(scales, amax) if fold else scales.float()
    scale = None if fold else (amax * nvfp4.INVERSE_RANGE).reshape(1)
    return Read(values.mul_(decode).to(x.dtype).view(x.shape), scale)


def _blocks(x: Tensor, operand: Operand, along: Along) -> tuple[Tensor, tuple[int, ...]]:
    """A float32 view of (T, K) in which each block is whole in ``dims``."""
    assert operand.block is not None
    height, width = operand.block if along == "rows" else reversed(operand.block)
    tokens, features = x.shape
    if tokens % height or features % width:
        raise ValueError(f"{operand.format} blocks of ({height}, {width}) do not divide shape {(*x.shape,)}")
    if operand.hadamard and along == "rows":
        raise ValueError("rotations lie along columns: wgrad is the only GEMM with rotated operands")
    wide = x.float()
    if height == 1:
        return wide.view(tokens, features // width, width), (2,)
    if width == 1:
        return wide.view(tokens // height, height, features), (1,)
    return wide.view(tokens // height, height, features // width, width), (1, 3)


def _round_nearest(x: Tensor) -> Tensor:
    """The nearest E2M1 value, halves to even: adding 1.5 * 2^23 steps makes float32 round to whole steps."""
    shift = _step(x).mul_(1.5 * 2**_MANTISSA_BITS)
    return (x + shift).sub_(shift)


def _round_stochastic(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """One of the two neighbouring E2M1 values, up with probability (distance from the lower) / (their distance)."""
    if generator is None:
        raise ValueError("stochastic rounding needs a generator")
    step = _step(x)
    position = x / step
    lower = position.floor()
    return (lower + (_uniform(x, generator) < position - lower)).mul_(step)


def _step(x: Tensor) -> Tensor:
    """Distance of E2M1's values in the binade of each element of ``x``: 0.5 below 2, then 1, then 2 from 4 on."""
    binade = (x.view(torch.int32) & _EXPONENT_MASK).view(torch.float32)
    return binade.clamp_(min=1.0).mul_(0.5)


def _uniform(x: Tensor, generator: torch.Generator) -> Tensor:
    """Midpoints of 2^16 equal parts of [0, 1), drawn four to a word."""
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64, device=x.device)
    words.random_(-(2**63), None, generator=generator)
    bits = words.view(torch.int16)[: x.numel()].view(x.shape)
    return bits.float().add_(2 ** (_RANDOM_BITS - 1) + 0.5).mul_(2**-_RANDOM_BITS)


def _mxfp8(blocks: Tensor, dims: tuple[int, ...]) -> Tensor:
    # The kernels' fmax ignores NaN.
    block_amax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(dims, keepdim=True)
    exponents = mxfp8.scale_exponents(block_amax)
    codes = (blocks * mxfp8.power_of_two(2 * mxfp8.BIAS - exponents)).clamp_(-mxfp8.E4M3_MAX, mxfp8.E4M3_MAX)
    return codes.to(torch.float8_e4m3fn).float().mul_(mxfp8.power_of_two(exponents))
