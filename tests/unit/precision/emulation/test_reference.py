"""``read`` on a CPU gives the values of the formats (which equal Transformer Engine's, see tests/parity)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.precision.emulation.read import Read, read
from nemotron3_megatron.precision.formats import e2m1, mxfp8, nvfp4
from nemotron3_megatron.precision.operands import Operand

INPUT = Operand(tensor="input", format="nvfp4", block=(1, 16))
ROTATED = Operand(tensor="input", format="nvfp4", block=(1, 16), hadamard=16)
SQUARE = Operand(tensor="weight", format="nvfp4", block=(16, 16))
GRADIENT = Operand(tensor="gradient", format="nvfp4", block=(1, 16), rounding="stochastic")
MXFP8 = Operand(tensor="input", format="mxfp8", block=(1, 32))

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "log-normal": lambda x: x * (2 * x.roll(1)).exp(),
    "tiny": lambda x: x * 1e-38,
    "huge": lambda x: x * 1e37,
    "sparse": lambda x: x * (x > 1.5),
    "zeros": torch.zeros_like,
    "ties": lambda x: (x * 4).round() / 4,
    "one huge": lambda x: x + 1e30 * (torch.arange(x.numel()).view(x.shape) == 37),
    "infinite": lambda x: torch.where(x > 2.5, torch.inf, x),
    "nan": lambda x: torch.where(x > 2.5, torch.nan, x),
}


def matrix(kind: str, tokens: int, features: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](torch.randn(tokens, features, generator=generator)).to(dtype)


def whole(part: Read | None) -> Tensor:
    assert part is not None
    return part.values.float() if part.scale is None else part.values.float() * part.scale


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal values; NaN where NaN is expected."""
    return torch.equal(found.isnan(), expected.isnan()) and torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_folded_values_are_the_formats(kind: str, dtype: torch.dtype) -> None:
    x = matrix(kind, 64, 96, dtype)
    rows, columns = read(x, INPUT, INPUT, fold=True)
    assert rows is not None
    assert columns is not None
    assert same(rows.values, nvfp4.quantize(x).dequantize(dtype))
    assert same(columns.values, nvfp4.quantize(x.T.contiguous()).dequantize(dtype).T)
    square, _ = read(x, SQUARE, None, fold=True)
    assert square is not None
    assert same(square.values, nvfp4.quantize(x, block=(16, 16)).dequantize(dtype))
    rows, columns = read(x, MXFP8, MXFP8)
    assert rows is not None
    assert columns is not None
    assert same(rows.values, mxfp8.quantize(x).dequantize(dtype))
    assert same(columns.values, mxfp8.quantize(x.T.contiguous()).dequantize(dtype).T)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 9), st.sampled_from(["normal", "ties", "sparse", "zeros"]), st.integers(0, 99))
def test_bfloat16_rotations_are_the_formats(rows: int, columns: int, kind: str, seed: int) -> None:
    """Within 12 binades, where the order of a sum does not matter (formats.hadamard.rotate)."""
    x = matrix(kind, 16 * rows, 16 * columns, torch.bfloat16, seed)
    x = torch.where(x.abs() < x.abs().max() / 2**12, 0, x)
    _, found = read(x, None, ROTATED, fold=True)
    assert found is not None
    assert same(found.values, nvfp4.quantize(x.T.contiguous(), hadamard=True).dequantize(torch.bfloat16).T)


def test_values_apart_from_the_tensors_scale() -> None:
    """They are code times block scale, and exact in BF16."""
    x = matrix("log-normal", 64, 96, torch.bfloat16)
    (part, _), reference = read(x, INPUT, None), nvfp4.quantize(x)
    assert part is not None
    assert part.scale is not None
    exact = e2m1.decode(reference.codes).double() * reference.scales.double().repeat_interleave(16, -1)
    assert torch.equal(part.values.double(), exact)
    assert part.scale.item() == pytest.approx(float(x.abs().max()) / 2688, rel=1e-6)


@pytest.mark.parametrize("operand", [INPUT, ROTATED, SQUARE, MXFP8], ids=lambda o: f"{o.format}{o.block}{o.hadamard}")
def test_segments_are_quantised_apart(operand: Operand) -> None:
    x = matrix("log-normal", 160, 64, torch.bfloat16)
    bounds = [0, 64, 64, 96, 160]
    segments = torch.tensor(bounds, dtype=torch.int32)
    rows, columns = (None, operand) if operand.hadamard else (operand, None)
    together = next(part for part in read(x, rows, columns, offsets=segments) if part is not None)
    apart = [read(x[a:b], rows, columns) for a, b in pairwise(bounds)]
    parts = [part for pair in apart for part in pair if part is not None]
    assert torch.equal(together.values, torch.cat([part.values for part in parts]))
    if operand.format == "nvfp4":
        assert together.scale is not None
        assert torch.equal(together.scale, torch.cat([p.scale for p in parts if p.scale is not None]))
        assert together.scale[1] == 0


def test_stochastic_rounding_is_unbiased_and_stays_with_the_neighbours() -> None:
    """The mean of n draws of a value between neighbours 1 step apart has a standard error of at most 0.5 / sqrt(n).

    40,000 draws: 0.0025 steps. Of 20 values, six standard errors miss by chance once in 10^7 runs; a bias of 0.03
    steps (half a step of 4 random bits) is twelve. Block scales are 1 because a 6 and the tensor's amax are in each
    block of 16.
    """
    values = torch.linspace(0.03, 5.9, 20)
    draws = 40_000
    x = torch.zeros(draws, 32)
    x[:, :15], x[:, 16:21] = values[:15], values[15:]
    x[:, 15] = x[:, 31] = 6.0
    part, _ = read(x, GRADIENT, None, generator=torch.Generator().manual_seed(3), fold=True)
    assert part is not None
    drawn = torch.cat([part.values[:, :15], part.values[:, 16:21]], 1)
    grid = torch.tensor(e2m1.VALUES[:8])
    above = torch.searchsorted(grid, values)
    low, high = grid[above - 1], grid[above]
    assert bool(((drawn == low) | (drawn == high)).all())
    assert float(((drawn.mean(0) - values) / (high - low)).abs().max()) < 6 * 0.5 / draws**0.5


def test_stochastic_rounding_keeps_values_of_the_format() -> None:
    x = torch.tensor(e2m1.VALUES).repeat(512, 1)
    part, _ = read(x, GRADIENT, None, generator=torch.Generator().manual_seed(3), fold=True)
    assert part is not None
    assert torch.equal(part.values, x)


def test_stochastic_rounding_follows_its_generator() -> None:
    x = matrix("normal", 32, 64, torch.float32)
    draw = [read(x, GRADIENT, GRADIENT, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    first, again, other = ([whole(part) for part in pair] for pair in draw)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[0], other[0])
    with pytest.raises(ValueError, match="generator"):
        read(x, GRADIENT, None)


@pytest.mark.parametrize(("shape", "operand"), [((32, 40), INPUT), ((32, 48), MXFP8), ((24, 32), SQUARE)])
def test_incomplete_blocks_are_refused(shape: tuple[int, int], operand: Operand) -> None:
    with pytest.raises(ValueError, match="do not divide shape"):
        read(torch.ones(shape), operand, None)
