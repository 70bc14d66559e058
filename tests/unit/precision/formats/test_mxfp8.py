"""MXFP8 against its definition: the smallest power of two that fits, and the nearest E4M3 number by trying all."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.precision.formats import mxfp8

E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]


def nearest(x: float) -> float:
    if math.isnan(x):
        return x
    distances = np.abs(min(abs(x), 448.0) - np.array(E4M3))
    return math.copysign(E4M3[min(np.flatnonzero(distances == distances.min()), key=lambda code: code % 2)], x)


def definition(block: list[float]) -> tuple[int, list[float]]:
    """Exponent code and E4M3 values of 32 float32 numbers, in float64 but for the product that decides the scale."""
    amax = max((abs(x) for x in block if not math.isnan(x)), default=0.0)
    least = float(np.float32(amax) * (np.float32(1) / np.float32(448)))
    exponent = next((e for e in range(254) if 2.0 ** (e - 127) >= least), 254)
    return exponent, [nearest(x / 2.0 ** (exponent - 127)) for x in block]


def assert_defined(x: Tensor) -> None:
    found = mxfp8.quantize(x)
    blocks = x.double().reshape(-1, 32).tolist()
    exponents, values = zip(*(definition(block) for block in blocks), strict=True)
    assert found.scales.flatten().tolist() == list(exponents)
    np.testing.assert_array_equal(found.codes.float().reshape(-1, 32).numpy(), np.array(values))


@given(st.lists(st.floats(width=32), min_size=32, max_size=32), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_any_numbers(numbers: list[float], dtype: str) -> None:
    assert_defined(torch.tensor(numbers).reshape(1, 32).to(getattr(torch, dtype)))


@pytest.mark.parametrize("scale", [0.0, 2.0**-149, 2.0**-135, 2.0**-120, 1e-20, 1.0, 1e30])
def test_random_matrices(scale: float) -> None:
    g = torch.Generator().manual_seed(0)
    assert_defined(torch.randn(4, 64, generator=g) * torch.exp(2 * torch.randn(4, 64, generator=g)) * scale)


def test_scales_around_powers_of_two() -> None:
    """448 times a power of two needs that power; the next number above needs the next."""
    exact = torch.tensor([448 * 2.0**e for e in range(-127, 119)])
    x = torch.zeros(2, len(exact), 32)
    x[0, :, 5], x[1, :, 5] = exact, torch.nextafter(exact, torch.tensor(math.inf))
    assert_defined(x)
    scales = mxfp8.quantize(x).scales[..., 0]
    assert scales.dtype == torch.uint8


def test_ties_go_to_even() -> None:
    values = torch.tensor([448.0, *((a + b) / 2 for a, b in itertools.pairwise(E4M3[:32]))])
    assert_defined(values.reshape(1, 32))


def test_no_finite_number_saturates_and_nothing_is_lost_but_rounding() -> None:
    """E4M3 keeps 4 significant bits: half of its last is 1/16 of the value, or 2^-10 of a unit when subnormal."""
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1))
    q = mxfp8.quantize(x)
    unit = torch.exp2(q.scales.float() - 127).repeat_interleave(32, -1)
    assert (x.abs() <= 448 * unit).all()
    assert ((q.dequantize() - x).abs() <= torch.maximum(x.abs() / 16, unit * 2.0**-10)).all()
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(q.dequantize(torch.bfloat16).float(), q.dequantize()), "exact in bfloat16"


def test_shapes() -> None:
    q = mxfp8.quantize(torch.ones(2, 3, 96, dtype=torch.bfloat16))
    assert q.codes.shape == q.dequantize().shape == (2, 3, 96)
    assert q.codes.dtype == torch.float8_e4m3fn
    assert q.scales.shape == (2, 3, 3)
    assert mxfp8.quantize(torch.ones(0, 32)).dequantize().shape == (0, 32)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 32, dtype=torch.float64), "float64"),
        (torch.ones(2, 48), "divisible by 32"),
        (torch.ones(()), "divisible by 32"),
    ],
)
def test_refuses(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mxfp8.quantize(x)
