"""MXFP8: one pass over the source, both directions at once.

A program takes 32 rows, which are one block of the columns, and blocks of 32 columns. There is no scale of the tensor,
so that segments make no difference.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemotron3_megatron.precision.emulation.kernels.arithmetic import e4m3_values, mxfp8_block_scale, tile


@triton.jit
def quantise_kernel(
    x: tl.tensor,
    row_values: tl.tensor | None,
    column_values: tl.tensor | None,
    T: tl.tensor,
    K: tl.tensor,
    BLOCKS: tl.constexpr,
) -> None:
    """Values along rows, along columns, or both, where the pointer is not None."""
    chunks = tl.cdiv(K, BLOCKS * 32)
    place, inside = tile(tl.program_id(0) // chunks * 32, tl.program_id(0) % chunks, T, K, 32, BLOCKS)
    source = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    if row_values is not None:
        decode, encode = mxfp8_block_scale(tl.max(tl.abs(source), 2, keep_dims=True))
        tl.store(row_values + place, (e4m3_values(source, encode) * decode).to(x.dtype.element_ty), mask=inside)
    if column_values is not None:
        decode, encode = mxfp8_block_scale(tl.max(tl.abs(source), 0, keep_dims=True))
        tl.store(column_values + place, (e4m3_values(source, encode) * decode).to(x.dtype.element_ty), mask=inside)
