"""NVFP4: two passes over the source, each for both directions.

A program takes 16 rows, which are one block of the columns and lie in one segment, and blocks of 16 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemotron3_megatron.precision.emulation.kernels.arithmetic import (
    e2m1_values,
    magnitude_bits,
    nvfp4_block_scale,
    nvfp4_tensor_scale,
    random_bits,
    rotate,
    round_to,
    tile,
)
from nemotron3_megatron.precision.formats import nvfp4

INVERSE_RANGE: tl.constexpr = tl.constexpr(nvfp4.INVERSE_RANGE)


@triton.jit
def segment_of(offsets: tl.tensor, row: tl.tensor, S: tl.tensor, PADDED: tl.constexpr) -> tl.tensor:
    """Index of the segment that holds ``row``; ``PADDED``: a power of two, at least ``S``."""
    index = tl.arange(0, PADDED)
    ends = tl.load(offsets + 1 + index, mask=index < S, other=0x7FFFFFFF)
    return tl.minimum(tl.sum((ends <= row).to(tl.int32), 0), S - 1)


@triton.jit
def amax_kernel(
    x: tl.tensor,
    offsets: tl.tensor | None,
    amax: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    S: tl.tensor,
    PLAIN: tl.constexpr,
    ROTATED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Largest magnitudes of each segment, as bits of float32 in ``amax`` (2, S) int32, which starts as zeros: of the
    source, and of the source rotated and rounded to its type.

    ``PARTS`` programs share 16 rows, each taking every ``PARTS``-th chunk of columns.
    """
    row = tl.program_id(0) // PARTS * 16
    plain = tl.zeros((), tl.int32)
    rotated = tl.zeros((), tl.int32)
    for chunk in range(tl.program_id(0) % PARTS, tl.cdiv(K, BLOCKS * 16), PARTS):
        place, inside = tile(row, chunk, T, K, 16, BLOCKS)
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        if PLAIN:
            plain = tl.maximum(plain, tl.max(magnitude_bits(values)))
        if ROTATED:
            rotated = tl.maximum(rotated, tl.max(magnitude_bits(rotate(values, BLOCKS))))
    segment = 0 if offsets is None else segment_of(offsets, row, S, PADDED)
    if PLAIN:
        tl.atomic_max(amax + segment, plain, sem="relaxed")
    if ROTATED:
        # Rounding keeps order: the largest rounded is the largest, rounded.
        largest = rotated.to(tl.float32, bitcast=True).to(x.dtype.element_ty).to(tl.float32)
        tl.atomic_max(amax + S + segment, magnitude_bits(largest), sem="relaxed")


@triton.jit
def store_scales(
    amax: tl.tensor, scales: tl.tensor, S: tl.tensor, HADAMARD: tl.constexpr, PADDED: tl.constexpr
) -> None:
    """Scale of each segment, of rows and of columns."""
    index = tl.arange(0, PADDED)
    for i in tl.static_range(2):
        largest = tl.load(amax + (S if i == 1 and HADAMARD else 0) + index, mask=index < S).to(tl.float32, bitcast=True)
        tl.store(scales + i * S + index, largest * INVERSE_RANGE, mask=index < S)


# Else a counter of 1, or one divisible by 16, would compile a kernel of its own.
@triton.jit(do_not_specialize=["seed", "counter"])
def quantise_kernel(
    x: tl.tensor,
    offsets: tl.tensor | None,
    amax: tl.tensor,
    row_values: tl.tensor | None,
    column_values: tl.tensor | None,
    scales: tl.tensor | None,
    seed: tl.tensor,
    counter: tl.tensor,
    T: tl.tensor,
    K: tl.tensor,
    S: tl.tensor,
    SQUARE: tl.constexpr,
    HADAMARD: tl.constexpr,
    STOCHASTIC_ROWS: tl.constexpr,
    STOCHASTIC_COLUMNS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PADDED: tl.constexpr,
) -> None:
    """Values along rows, along columns, or both, where the pointer is not None.

    ``scales`` (2, S) float32, of rows and of columns; None: multiplied into the values.
    """
    # Backwards: of what the first pass read last, part is still in the L2 cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunks = tl.cdiv(K, BLOCKS * 16)
    row, chunk = program // chunks * 16, program % chunks
    place, inside = tile(row, chunk, T, K, 16, BLOCKS)
    source = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    segment = 0 if offsets is None else segment_of(offsets, row, S, PADDED)
    if scales is not None:  # noqa: SIM102  (the first is decided at compile time)
        if program == 0:
            store_scales(amax, scales, S, HADAMARD, PADDED)
    if row_values is not None:
        largest = tl.load(amax + segment).to(tl.float32, bitcast=True)
        scale, inverse = nvfp4_tensor_scale(largest)
        block = tl.max(tl.abs(source), 2, keep_dims=True)
        if SQUARE:
            block = tl.max(block, 0, keep_dims=True)
        decode, encode = nvfp4_block_scale(block, scale, inverse)
        if scales is None:
            decode = decode * largest * INVERSE_RANGE
        bits = random_bits(seed, counter, row, chunk, K, False, BLOCKS) if STOCHASTIC_ROWS else None
        values = e2m1_values(source, encode, bits) * decode
        tl.store(row_values + place, values.to(x.dtype.element_ty), mask=inside)
    if column_values is not None:
        largest = tl.load(amax + (S if HADAMARD else 0) + segment).to(tl.float32, bitcast=True)
        scale, inverse = nvfp4_tensor_scale(largest)
        if HADAMARD:
            source = round_to(rotate(source, BLOCKS), x.dtype.element_ty)
        decode, encode = nvfp4_block_scale(tl.max(tl.abs(source), 0, keep_dims=True), scale, inverse)
        if scales is None:
            decode = decode * largest * INVERSE_RANGE
        bits = random_bits(seed, counter + 1, row, chunk, K, True, BLOCKS) if STOCHASTIC_COLUMNS else None
        values = e2m1_values(source, encode, bits) * decode
        tl.store(column_values + place, values.to(x.dtype.element_ty), mask=inside)
