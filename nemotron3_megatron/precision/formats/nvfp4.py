"""NVFP4: E2M1 codes, an E4M3 scale for each block of 16 elements or 16x16, and one float32 scale for the tensor.

Bit for bit Transformer Engine's algorithm (2.20, without NVTE_USE_FAST_MATH), every operation in float32:

    S     = 448 * 6 / amax                       at most FLT_MAX; 1 where amax is 0 or the quotient is
    scale = E4M3(block_amax * (S * (1 / 6)))     saturating
    code  = E2M1(x * (1 / (scale * (1 / S))))    the reciprocal at most FLT_MAX

    value = code * ((scale * amax) * (1 / 2688))

A block so much smaller than the tensor that its scale is 0 has codes up to +-6 and value 0. NaN makes every scale of
the tensor NaN through ``amax``, or its block's where a finite ``amax`` is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron3_megatron.precision.formats import e2m1
from nemotron3_megatron.precision.formats.hadamard import rotate

Rounding = Literal["nearest", "stochastic"]

BLOCK = 16
"""Elements along the last dimension that share a scale."""

E4M3_MAX = 448.0
INVERSE_RANGE = 1 / (E4M3_MAX * e2m1.MAX)
"""1 / 2688: a tensor's scale is its amax times this."""
FLOAT32_MAX = torch.finfo(torch.float32).max


@dataclass(frozen=True, slots=True, eq=False)
class NVFP4Tensor:
    """A quantised matrix, in the rotated basis if it was rotated."""

    codes: Tensor
    """(..., n) uint8, one E2M1 code an element."""
    scales: Tensor
    """float8_e4m3fn: (..., ceil(n / 16)) for blocks of (1, 16); (ceil(m / 16), ceil(n / 16)) for (16, 16), where m is
    the number of rows of the matrix, all leading dimensions together."""
    amax: Tensor
    """() float32, what the tensor's scale was computed from."""
    block: tuple[int, int]
    """(rows, columns) that share a scale."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(..., n) values, computed in float32 and rounded to ``dtype``."""
        columns = self.codes.shape[-1]
        scales = decode_scales(self.scales, self.amax)
        scales = scales.reshape(-1, scales.shape[-1]).repeat_interleave(BLOCK, -1)[:, :columns]
        values = e2m1.decode(self.codes).reshape(-1, columns)
        scales = scales.repeat_interleave(self.block[0], 0)[: len(values)]
        return (values * scales).to(dtype).reshape(self.codes.shape)


def quantize(
    x: Tensor,
    *,
    block: tuple[int, int] = (1, 16),
    amax: Tensor | None = None,
    hadamard: bool = False,
    rounding: Rounding = "nearest",
    generator: torch.Generator | None = None,
) -> NVFP4Tensor:
    """Quantise along the last dimension.

    An incomplete last block (of columns, or of rows in a 16x16 block) is as if completed with zeros, which is what
    Transformer Engine's Python reference does; its kernels need both dimensions divisible by 16.

    Args:
        x: (..., n) float32, bfloat16 or float16; leading dimensions are rows of one matrix.
        block: (1, 16), or (16, 16) for weights, whose transpose then has the same values.
        amax: float32, one element: the largest magnitude over all that shares the tensor's scale (after rotation),
            where ``x`` is only a part of it. Default: that of ``x``.
        hadamard: first rotate blocks of 16 (:func:`~nemotron3_megatron.precision.formats.hadamard.rotate`).
        rounding: of the codes: ``"nearest"`` (halves to even) or ``"stochastic"``.
        generator: on ``x``'s device; needed and drawn from for stochastic rounding only.

    Raises:
        ValueError: an argument is none of the above, or n is not divisible by 16 with ``hadamard``.
    """
    _check(x, block, amax)
    x = x.detach()
    if hadamard:
        x = rotate(x)
    amax = largest_magnitude(x) if amax is None else amax.detach().reshape(())
    columns, height = x.shape[-1], block[0]
    matrix = x.reshape(-1, columns).float()
    padded = F.pad(matrix, (0, -columns % BLOCK, 0, -len(matrix) % height))
    blocks = padded.view(len(padded) // height, height, padded.shape[1] // BLOCK, BLOCK)

    scales, encode = block_scales(blocks.abs().amax((1, 3)), amax)
    scaled = (blocks * encode[:, None, :, None]).view(padded.shape)[: len(matrix), :columns].reshape(x.shape)
    codes = _encode(scaled, rounding, generator)
    if height == 1:
        scales = scales.reshape(*x.shape[:-1], scales.shape[-1])
    return NVFP4Tensor(codes, scales, amax, block)


def largest_magnitude(x: Tensor) -> Tensor:
    """() float32: the largest magnitude in ``x``, 0 for an empty tensor, NaN if there is a NaN."""
    return x.detach().abs().amax().float() if x.numel() else x.new_zeros((), dtype=torch.float32)


def block_scales(block_amax: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 scales, and the float32 factors that take elements to E2M1's range; both shaped like ``block_amax``.

    Args:
        block_amax: float32, any shape.
        amax: float32 of the whole tensor, () or of a shape that broadcasts with ``block_amax``.
    """
    # A tensor as numerator: torch evaluates ``number / tensor`` as a product with the rounded reciprocal.
    tensor_scale = (torch.full_like(amax, E4M3_MAX * e2m1.MAX) / amax).clamp(max=FLOAT32_MAX)
    tensor_scale = torch.where((amax == 0) | (tensor_scale == 0), 1.0, tensor_scale)
    scales = (block_amax * (tensor_scale * (1 / e2m1.MAX))).clamp(max=E4M3_MAX).to(torch.float8_e4m3fn)
    encode = (scales.float() * tensor_scale.reciprocal()).reciprocal().clamp(max=FLOAT32_MAX)
    return scales, encode


def decode_scales(scales: Tensor, amax: Tensor) -> Tensor:
    """float32 factors that take E2M1 values back, shaped like the E4M3 ``scales``."""
    return scales.float() * amax * INVERSE_RANGE


def _encode(scaled: Tensor, rounding: Rounding, generator: torch.Generator | None) -> Tensor:
    if rounding == "nearest":
        return e2m1.encode_nearest(scaled)
    if rounding != "stochastic":
        raise ValueError(f"rounding is 'nearest' or 'stochastic', not {rounding!r}")
    if generator is None:
        raise ValueError("stochastic rounding needs a generator")
    return e2m1.encode_stochastic(scaled, generator)


def _check(x: Tensor, block: tuple[int, int], amax: Tensor | None) -> None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"NVFP4 quantises float32, bfloat16 and float16, not {x.dtype}")
    if x.ndim == 0 or x.shape[-1] == 0:
        raise ValueError(f"NVFP4 quantises along a last dimension of at least 1, not shape {(*x.shape,)}")
    if block not in ((1, BLOCK), (BLOCK, BLOCK)):
        raise ValueError(f"NVFP4 blocks are (1, 16) or (16, 16), not {block}")
    if amax is not None and (amax.dtype != torch.float32 or amax.numel() != 1):
        raise ValueError(f"amax is one float32 number, not {amax.dtype} {(*amax.shape,)}")
