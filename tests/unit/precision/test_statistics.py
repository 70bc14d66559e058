"""Operand statistics against numpy: every scale and code found by search in the format's list of values."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from nemotron3_megatron.precision.operands import Operand
from nemotron3_megatron.precision.statistics import MAXIMA, SUMS, Along, OperandStatistics, operand_statistics, summary

Array = np.ndarray[Any, Any]

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
E4M3 = [m * 2.0**-9 for m in range(8)] + [(1 + m / 8) * 2.0**e for e in range(-6, 9) for m in range(8)][:-1]
SIGNS = np.array([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1])

NVFP4 = Operand(tensor="input", format="nvfp4", block=(1, 16))
SQUARE = Operand(tensor="weight", format="nvfp4", block=(16, 16))
ROTATED = Operand(tensor="input", format="nvfp4", block=(1, 16), hadamard=16)
MXFP8 = Operand(tensor="input", format="mxfp8", block=(1, 32))
STOCHASTIC = Operand(tensor="gradient", format="nvfp4", block=(1, 16), rounding="stochastic")


def nearest(x: float, values: list[float]) -> float:
    """The nearest of ascending values, of two equally near the one with the even index; saturating."""
    best = min(range(len(values)), key=lambda i: (abs(values[i] - abs(x)), i % 2))
    return math.copysign(values[best], x)


def blocks_of(x: Array, operand: Operand, along: Along) -> list[Array]:
    """All blocks, completed with zeros, rotated."""
    assert operand.block is not None
    matrix = x if along == "rows" else x.T
    height, width = operand.block
    padded = np.pad(matrix, ((0, -matrix.shape[0] % height), (0, -matrix.shape[1] % width)))
    if operand.hadamard:
        sylvester = np.array([[(-1) ** (i & j).bit_count() for j in range(16)] for i in range(16)])
        rotation = SIGNS[:, None] * sylvester / 4
        padded = (padded.reshape(len(padded), -1, 16) @ rotation).reshape(padded.shape)
    return [
        padded[i : i + height, j : j + width].flatten()
        for i in range(0, padded.shape[0], height)
        for j in range(0, padded.shape[1], width)
    ]


def quantised(block: Array, amax: float, number_format: str) -> tuple[list[float], float, float]:
    """Values, the magnitude beyond which elements are clamped, and the scale, of one block."""
    block_amax = float(np.abs(block).max())
    if number_format == "mxfp8":
        exponent = max(math.ceil(math.log2(block_amax / 448)), -127) if block_amax else -127
        return [nearest(v / 2.0**exponent, E4M3) * 2.0**exponent for v in block], 448 * 2.0**exponent, exponent
    whole = 2688 / amax if amax else 1.0
    scale = nearest(block_amax * whole / 6, E4M3)
    if scale == 0:
        return [0.0] * len(block), math.inf, 0.0
    return [nearest(v * whole / scale, E2M1) * scale / whole for v in block], 6 * scale / whole, scale


def brute_force(x: Array, operand: Operand, along: Along) -> dict[str, float]:
    blocks = blocks_of(x.astype(np.float64), operand, along)
    amax = max(float(np.abs(block).max()) for block in blocks)
    sums = dict.fromkeys(SUMS, 0.0)
    scales = []
    for block in blocks:
        values, top, scale = quantised(block, amax, operand.format)
        for exact, value in zip(block, values, strict=True):
            sums["nonzero"] += exact != 0
            sums["flushed"] += exact != 0 and value == 0
            sums["saturated"] += abs(exact) > top * (1 + 1e-9)
            sums["squared_error"] += (value - exact) ** 2
            sums["squared_norm"] += exact**2
        if block.any():
            scales.append(scale)
    sums["blocks"] = len(scales)
    if operand.format == "nvfp4":
        sums["zero_scales"] = sum(s == 0 for s in scales)
        sums["subnormal_scales"] = sum(0 < s < 2**-6 for s in scales)
    else:
        sums["subnormal_scales"] = sum(s == -127 for s in scales)
    return sums | {"amax": amax, "scale_max": max(scales), "minus_scale_min": -min(scales)}


def as_dict(found: OperandStatistics) -> dict[str, float]:
    named = zip((*SUMS, *MAXIMA), (*found.sums.tolist(), *found.maxima.tolist()), strict=True)
    return dict(named)


def uneven(seed: int, tokens: int, features: int) -> Array:
    """Integers over many binades, exact under rotation; a zero block, zeros, an outlier, blocks far below the rest."""
    generator = np.random.default_rng(seed)
    x = np.round(generator.normal(size=(tokens, features)) * 2.0 ** generator.integers(0, 8, (tokens, features)))
    x[:16, :16] = 0
    x[16:32, :16] = generator.choice([-8, 8], (16, 16))  # a block scale of 8 * 448 / 2^20: subnormal
    x[16:32, 16:32] = generator.choice([-1, 1], (16, 16))  # less than half of E4M3's least, 2^-9
    x[33, 5] = 2.0**20
    return x.astype(np.float32)


@pytest.mark.parametrize(
    ("operand", "along"),
    [
        (NVFP4, "rows"),
        (NVFP4, "columns"),
        (SQUARE, "rows"),
        (ROTATED, "columns"),
        (ROTATED, "rows"),
        (MXFP8, "rows"),
        (MXFP8, "columns"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.format}_{value.block[0]}_{value.hadamard}",
)
@pytest.mark.parametrize("shape", [(48, 64), (40, 40)], ids=["whole", "incomplete blocks"])
def test_equal_to_a_search_through_all_values(operand: Operand, along: Along, shape: tuple[int, int]) -> None:
    x = uneven(3, *shape)
    found = as_dict(operand_statistics([torch.from_numpy(x)], operand, along))
    expected = brute_force(x, operand, along)
    # Values are rounded to float32: relative 2^-23 each, against errors of a few percent of the elements.
    assert found == pytest.approx(expected, rel=1e-5)
    assert expected["squared_error"] > 0
    if operand.format == "nvfp4":
        assert expected["flushed"] > 0
    if operand.format == "nvfp4" and not operand.hadamard:
        assert expected["zero_scales"] > 0
        assert expected["subnormal_scales"] > 0


def test_nvfp4_clamps_where_its_block_scale_rounds_down() -> None:
    x = torch.zeros(1, 32)
    x[0, 0] = 2688.0  # the tensor's scale is 1
    x[0, 16:20] = torch.tensor([6 * 17.0, 6 * 16.0, 100.0, 1.0])  # block scale 17, between 16 and 18: 16 is even
    found = as_dict(operand_statistics([x], NVFP4, "rows"))
    assert (found["scale_max"], -found["minus_scale_min"]) == (448, 16)
    assert found["saturated"] == 2  # 102 and 100, more than 96
    assert found["flushed"] == 1  # 1 / 16 is nearer to 0 than to 0.5


def test_mxfp8_saturates_for_no_finite_number() -> None:
    # Magnitudes over all of float32's binades.
    x = torch.exp2(torch.linspace(-140, 127.9, 32 * 64)).reshape(64, 32)[torch.randperm(64)]
    assert as_dict(operand_statistics([x], MXFP8, "columns"))["saturated"] == 0


def test_parts_have_an_amax_each_and_add_up() -> None:
    parts = [torch.from_numpy(uneven(seed, 48, 64)) * 3.0**seed for seed in range(3)]
    together = as_dict(operand_statistics(parts, NVFP4, "columns"))
    apart = [as_dict(operand_statistics([part], NVFP4, "columns")) for part in parts]
    for name in SUMS:
        assert together[name] == pytest.approx(sum(found[name] for found in apart), rel=1e-12)
    for name in MAXIMA:
        assert together[name] == max(found[name] for found in apart)


def test_a_shared_amax_decides_the_scales() -> None:
    x = torch.from_numpy(uneven(1, 48, 64))
    half = as_dict(operand_statistics([x], NVFP4, "rows", amax=torch.tensor([2.0**21])))
    alone = as_dict(operand_statistics([x], NVFP4, "rows"))
    assert half["amax"] == 2 * alone["amax"]
    assert half["scale_max"] == alone["scale_max"] / 2


@pytest.mark.parametrize("along", ["rows", "columns"])
def test_a_large_tensor_is_sampled_and_its_amax_is_not(along: Along) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 1024, generator=generator)
    x[1, 1] = 60.0  # in no sampled block: the grid's second row and column of blocks are far from here
    whole = operand_statistics([x], NVFP4, along, limit=x.numel())
    sample = operand_statistics([x], NVFP4, along, limit=2**15)
    exact, estimate = (summary(s.sums.tolist(), s.maxima.tolist()) for s in (whole, sample))
    assert whole.sums[0] == x.count_nonzero()
    assert sample.sums[0] <= 2**15
    assert sample.sums[0] > 2**14
    assert estimate.amax == exact.amax == 60.0
    p = exact.flush_to_zero
    # Five standard deviations of a share among independent elements; the error's relative deviation is below 1 %.
    assert estimate.flush_to_zero == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / sample.sums[0].item()))
    assert estimate.relative_error == pytest.approx(exact.relative_error, rel=0.05)


def test_stochastic_rounding_flushes_in_proportion() -> None:
    x = torch.rand(256, 256, generator=torch.Generator().manual_seed(1)) + 1e-3
    found = as_dict(operand_statistics([x], STOCHASTIC, "rows", generator=torch.Generator().manual_seed(2)))
    expected = variance = 0.0
    for block in blocks_of(x.numpy().astype(np.float64), STOCHASTIC, "rows"):
        whole = 2688 / x.max().item()
        position = block * whole / nearest(block.max() * whole / 6, E4M3)
        flush = np.maximum(1 - 2 * position, 0)  # the neighbours are 0 and 0.5
        expected, variance = expected + flush.sum(), variance + (flush * (1 - flush)).sum()
    assert found["flushed"] == pytest.approx(expected, abs=5 * math.sqrt(variance))
    assert expected > 100
    with pytest.raises(ValueError, match="generator"):
        operand_statistics([x], STOCHASTIC, "rows")


def test_zeros_have_nothing_to_lose() -> None:
    for operand in (NVFP4, SQUARE, ROTATED, MXFP8):
        found = operand_statistics([torch.zeros(32, 32)], operand, "columns")
        assert found.sums.tolist() == [0.0] * len(SUMS)
        assert found.maxima.tolist() == [0.0, -math.inf, -math.inf]


def test_what_is_not_finite_is_not_hidden() -> None:
    x = torch.ones(32, 32)
    x[3, 4] = math.nan
    found = operand_statistics([x], NVFP4, "rows")
    assert math.isnan(summary(found.sums.tolist(), found.maxima.tolist()).relative_error)
    assert math.isnan(found.maxima[0])


def test_bfloat16_gives_what_its_values_give() -> None:
    x = torch.from_numpy(uneven(5, 64, 64)).bfloat16()
    for operand in (NVFP4, SQUARE, MXFP8):
        found, expected = (operand_statistics([values], operand, "rows") for values in (x, x.float()))
        assert torch.equal(found.sums, expected.sums)
        assert torch.equal(found.maxima, expected.maxima)


def test_unquantised_operands_are_refused() -> None:
    with pytest.raises(ValueError, match="no blocks"):
        operand_statistics([torch.ones(16, 16)], Operand(tensor="input", format="bf16"), "rows")
