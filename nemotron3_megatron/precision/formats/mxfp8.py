"""MXFP8: E4M3 codes and one power-of-two (E8M0) scale for each 32 elements (OCP Microscaling Formats 1.0, section 5).

As Transformer Engine's kernels compute it, which round the scale up so that no finite element saturates (the OCP
document's own example rounds it down):

    scale = 2^ceil(log2(block_amax * (1 / 448)))     the product in float32; at least 2^-127
    code  = E4M3(x / scale)                          nearest, halves to even, saturating at 448

    value = code * scale

There is no scale for the tensor, no rotation and no stochastic rounding. NaN elements stay NaN and do not count for
``block_amax``; an infinite one gives the largest scale, 2^127.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Elements along the last dimension that share a scale."""

E4M3_MAX = 448.0
BIAS = 127
"""A scale's exponent is its code minus this (E8M0, same section)."""


@dataclass(frozen=True, slots=True, eq=False)
class MXFP8Tensor:
    """A quantised matrix."""

    codes: Tensor
    """(..., n) float8_e4m3fn."""
    scales: Tensor
    """(..., n / 32) uint8 exponents e, for 2^(e - 127)."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., n) values, computed in float32 and rounded to ``dtype``."""
        scales = power_of_two(self.scales.int()).repeat_interleave(BLOCK, -1)
        return (self.codes.float() * scales).to(dtype)


def quantize(x: Tensor) -> MXFP8Tensor:
    """Quantise blocks of 32 along the last dimension.

    Args:
        x: (..., n) float32, bfloat16 or float16.

    Raises:
        ValueError: another type, or n is not divisible by 32, which Transformer Engine refuses as well.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"MXFP8 quantises float32, bfloat16 and float16, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] % BLOCK:
        raise ValueError(f"MXFP8 needs a last dimension divisible by {BLOCK}, not shape {(*x.shape,)}")
    blocks = x.detach().float().reshape(*x.shape[:-1], x.shape[-1] // BLOCK, BLOCK)
    # The kernels' fmax ignores NaN.
    block_amax = torch.where(blocks.isnan(), 0.0, blocks.abs()).amax(-1)
    exponents = scale_exponents(block_amax)
    scaled = blocks * power_of_two(2 * BIAS - exponents)[..., None]
    codes = scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return MXFP8Tensor(codes.reshape(x.shape), exponents.to(torch.uint8))


def scale_exponents(block_amax: Tensor) -> Tensor:
    """E8M0 codes (int32, 0..254) of blocks: the smallest 2^(code - 127) under which 448 covers ``block_amax`` >= 0."""
    bits = (block_amax * (1 / E4M3_MAX)).view(torch.int32)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Subnormals are multiples of 2^-149: up to mantissa 2^22 they are at most 2^-127, the smallest scale, code 0.
    exact = torch.where(exponent == 0, mantissa <= 0x400000, mantissa == 0)
    return (exponent + (~exact).int()).clamp(max=2 * BIAS)


def power_of_two(code: Tensor) -> Tensor:
    """float32 2^(code - 127) for int32 codes 0..254, by its bits: the smallest, 2^-127, is subnormal."""
    return torch.where(code == 0, 0x400000, code << 23).int().view(torch.float32)
