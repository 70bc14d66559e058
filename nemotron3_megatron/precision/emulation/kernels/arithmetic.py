"""What the kernels compute with: tiles, roundings, scales and the rotation, as precision.formats defines them.

All float32. Launch with ``enable_fp_fusion=False``: a product fused with the sum behind it would not be rounded.
A tile is (rows, blocks, columns of a block); its rows are one block of the columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from nemotron3_megatron.precision.formats import e2m1, hadamard, mxfp8, nvfp4

EXPONENT: tl.constexpr = tl.constexpr(0x7F800000)
MAGNITUDE: tl.constexpr = tl.constexpr(0x7FFFFFFF)
SIGN: tl.constexpr = tl.constexpr(-0x80000000)
FLOAT32_MAX: tl.constexpr = tl.constexpr(nvfp4.FLOAT32_MAX)
E2M1_MAX: tl.constexpr = tl.constexpr(e2m1.MAX)
E4M3_MAX: tl.constexpr = tl.constexpr(nvfp4.E4M3_MAX)
E4M3_MIN_NORMAL: tl.constexpr = tl.constexpr(2.0**-6)
E8M0_MAX: tl.constexpr = tl.constexpr(2 * mxfp8.BIAS)
NEGATIVE_SIGNS: tl.constexpr = tl.constexpr(sum(1 << i for i, sign in enumerate(hadamard.SIGNS) if sign < 0))
PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)
"""The fewest with which Philox4x32 passes all of BigCrush (Salmon et al., Parallel Random Numbers, 2011, table 2)."""
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def tile(
    row: tl.tensor, chunk: tl.tensor, T: tl.tensor, K: tl.tensor, SIZE: tl.constexpr, BLOCKS: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """(SIZE, BLOCKS, SIZE) places in the matrix from ``row`` on in a chunk of columns, and which of them it has."""
    down = tl.arange(0, SIZE)[:, None, None]
    right = (chunk * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]) * SIZE + tl.arange(0, SIZE)[None, None, :]
    return row.to(tl.int64) * K + (down * K + right), (right < K) & (row + down < T)


@triton.jit
def nearest(x: tl.tensor, MIN_NORMAL: tl.constexpr, MANTISSA_BITS: tl.constexpr) -> tl.tensor:
    """Round x >= 0, at most the largest value, to a small float format, halves to even.

    Adding 2^23 steps of the binade makes float32 round to whole steps; below the smallest normal number the step stays.
    """
    binade = (tl.maximum(x, MIN_NORMAL).to(tl.int32, bitcast=True) & EXPONENT).to(tl.float32, bitcast=True)
    shift = binade * (2.0 ** (23 - MANTISSA_BITS))
    return (x + shift) - shift


@triton.jit
def stochastic_e2m1(x: tl.tensor, bits: tl.tensor) -> tl.tensor:
    """Round 0 <= x <= 6 up with probability (distance from the lower value) / (distance of the two), within 2^-17.

    From 1 on, E2M1's values have 22 zeros behind their mantissa bit: adding a uniform number of 22 bits carries into it
    with the wanted probability. Numbers below 1, whose step is 0.5 too, are rounded one higher up.

    Args:
        x: float32.
        bits: int32, uniform below 2^22.
    """
    base = tl.where(x < 1.0, 1.0, 0.0)
    carried = (x + base).to(tl.int32, bitcast=True) + bits
    return (carried & -0x400000).to(tl.float32, bitcast=True) - base


@triton.jit
def round_to(x: tl.tensor, DTYPE: tl.constexpr) -> tl.tensor:
    """float32 rounded to a type, as float32."""
    # Two at a time, which is how the hardware rounds fast, and which the compiler does not see for itself.
    if DTYPE == tl.bfloat16 and not INTERPRETED:  # noqa: SIM300
        return tl.inline_asm_elementwise(
            "{ .reg .b32 both; cvt.rn.bf16x2.f32 both, $3, $2; shl.b32 $0, both, 16; and.b32 $1, both, 0xffff0000; }",
            "=r,=r,r,r",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(DTYPE).to(tl.float32)


@triton.jit
def magnitude_bits(x: tl.tensor) -> tl.tensor:
    """|x| as int32, ordered like the numbers, with NaN above all."""
    return x.to(tl.int32, bitcast=True) & MAGNITUDE


@triton.jit
def with_sign(magnitude: tl.tensor, x: tl.tensor) -> tl.tensor:
    """``magnitude`` with the sign bit of ``x``."""
    return (magnitude.to(tl.int32, bitcast=True) | (x.to(tl.int32, bitcast=True) & SIGN)).to(tl.float32, bitcast=True)


@triton.jit
def nvfp4_tensor_scale(amax: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """S, and 1 / S."""
    scale = tl.minimum(tl.div_rn(E4M3_MAX * E2M1_MAX, amax), FLOAT32_MAX, propagate_nan=tl.PropagateNan.ALL)
    scale = tl.where((amax == 0.0) | (scale == 0.0), 1.0, scale)
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def nvfp4_block_scale(block_amax: tl.tensor, scale: tl.tensor, inverse: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E4M3 scale of blocks, as float32, and the factor that takes their elements to E2M1's range.

    NaN need not be in ``block_amax``: it is in the tensor's, and so in ``scale``.
    """
    wanted = tl.minimum(block_amax * (scale * (1 / E2M1_MAX)), E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    block_scale = nearest(wanted, E4M3_MIN_NORMAL, 3)
    return block_scale, tl.minimum(tl.div_rn(1.0, block_scale * inverse), FLOAT32_MAX)


@triton.jit
def e2m1_values(x: tl.tensor, encode: tl.tensor, bits: tl.tensor | None) -> tl.tensor:
    """E2M1 values of ``x * encode``, rounded stochastically if there are random bits."""
    # The sum with 0 is exact and leaves no -0, which has no sign in E2M1.
    scaled = tl.fma(x, encode, 0.0)
    magnitude = tl.minimum(tl.abs(scaled), E2M1_MAX)
    rounded = nearest(magnitude, 1.0, 1) if bits is None else stochastic_e2m1(magnitude, bits)
    return with_sign(rounded, scaled)


@triton.jit
def power_of_two(code: tl.tensor) -> tl.tensor:
    """2^(code - 127) for codes 0 to 254, by its bits: the smallest is subnormal."""
    return tl.where(code == 0, 0x400000, code << 23).to(tl.float32, bitcast=True)


@triton.jit
def mxfp8_block_scale(block_amax: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """E8M0 scale of blocks, as float32, and the power of two that takes their elements to E4M3's range."""
    bits = (block_amax * (1 / E4M3_MAX)).to(tl.int32, bitcast=True)
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    # Subnormal numbers up to 2^-127, mantissa 0x400000, have the smallest scale.
    inexact = mantissa > tl.where(exponent == 0, 0x400000, 0)
    code = tl.minimum(exponent + inexact.to(tl.int32), E8M0_MAX)
    return power_of_two(code), power_of_two(E8M0_MAX - code)


@triton.jit
def e4m3_values(x: tl.tensor, encode: tl.tensor) -> tl.tensor:
    """E4M3 values of ``x * encode``; NaN stays."""
    scaled = x * encode
    magnitude = tl.minimum(tl.abs(scaled), E4M3_MAX, propagate_nan=tl.PropagateNan.ALL)
    return with_sign(nearest(magnitude, E4M3_MIN_NORMAL, 3), scaled)


@triton.jit
def rotate(x: tl.tensor, BLOCKS: tl.constexpr) -> tl.tensor:
    """Columns of a (16, BLOCKS, 16) tile times the Hadamard matrix: a butterfly in float32.

    Sums whose terms lie within 12 binades are exact, and the order of no consequence (formats.hadamard.rotate).
    """
    row = tl.arange(0, 16)[:, None, None]
    x = x * tl.where((NEGATIVE_SIGNS >> row) & 1 != 0, -0.25, 0.25)
    return butterfly(butterfly(butterfly(butterfly(x, 1, BLOCKS), 2, BLOCKS), 4, BLOCKS), 8, BLOCKS)


@triton.jit
def butterfly(x: tl.tensor, HALF: tl.constexpr, BLOCKS: tl.constexpr) -> tl.tensor:
    """Sums and differences of rows whose indices differ in bit ``HALF``."""
    pairs = tl.permute(tl.reshape(x, (8 // HALF, 2, HALF, BLOCKS, 16)), (0, 2, 3, 4, 1))
    a, b = tl.split(pairs)
    return tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 4, 1, 2, 3)), (16, BLOCKS, 16))


@triton.jit
def random_bits(
    seed: tl.tensor,
    counter: tl.tensor,
    row: tl.tensor,
    chunk: tl.tensor,
    K: tl.tensor,
    DOWN: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:
    """(16, BLOCKS, 16) int32 for :func:`stochastic_e2m1`, each with 16 bits of its own.

    Philox4x32 as CUDA counts: 8 elements, of a column if ``DOWN`` or else of a row, are a subsequence, and take the
    four words at ``counter``. So they are drawn by the threads that hold the elements of rotated columns, or of rows.
    """
    if DOWN:
        eights = row // 8 + tl.arange(0, 2)[:, None, None]
        right = (chunk * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]) * 16 + tl.arange(0, 16)[None, None, :]
        bits = eight_each(seed, counter, eights.to(tl.uint32) * K.to(tl.uint32) + right.to(tl.uint32))
        bits = tl.permute(bits, (0, 3, 4, 5, 1, 2))
    else:
        eights = (chunk * BLOCKS + tl.arange(0, BLOCKS)[:, None, None]) * 2 + tl.arange(0, 2)[None, None, :]
        down = row + tl.arange(0, 16)[None, :, None]
        bits = eight_each(seed, counter, down.to(tl.uint32) * (K // 8).to(tl.uint32) + eights.to(tl.uint32))
        bits = tl.permute(bits, (1, 0, 2, 3, 4, 5))
    return tl.reshape(bits, (16, BLOCKS, 16))


@triton.jit
def eight_each(seed: tl.tensor, counter: tl.tensor, subsequence: tl.tensor) -> tl.tensor:
    """(..., 2, 2, 2) int32 below 2^22 for each subsequence: the upper 16 bits are a half of a word of its own, the
    lower ones 2^5 (which makes rounding symmetric) or those of the other half."""
    zero = subsequence * 0
    counter = counter.to(tl.uint64)
    low, high = counter.to(tl.uint32) + zero, (counter >> 32).to(tl.uint32) + zero
    w0, w1, w2, w3 = philox(seed.to(tl.uint64), low, high, subsequence, zero)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.join(words << 6 & 0x3FFFC0 | 0x20, words >> 10).to(tl.int32, bitcast=True)


@triton.jit
def philox(
    seed: tl.tensor, c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Philox4x32 (Salmon et al. 2011). Triton's own multiplies twice for the two halves of each product."""
    k0, k1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        a, b = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        c0, c2 = (b >> 32).to(tl.uint32) ^ c1 ^ k0, (a >> 32).to(tl.uint32) ^ c3 ^ k1
        c1, c3 = b.to(tl.uint32), a.to(tl.uint32)
        k0, k1 = k0 + 0x9E3779B9, k1 + 0xBB67AE85
    return c0, c1, c2, c3
