"""NVFP4 against its definition, written out element by element with NumPy's float32 and brute-force rounding.

tests/parity/test_te_formats.py compares with Transformer Engine's reference where its sources are at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.precision.formats import nvfp4
from nemotron3_megatron.precision.formats.hadamard import rotate

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
E4M3 = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:127]
"""Non-negative finite values by code: bias 7, subnormal at exponent 0; the last of 128 is NaN."""

FLOAT32_MAX = np.finfo(np.float32).max
F = np.float32


def nearest(x: float, grid: list[float]) -> float:
    """The nearest number of an increasing grid to x >= 0, halves to the even code; beyond the last: the last."""
    distances = np.abs(min(x, grid[-1]) - np.array(grid))
    return grid[min(np.flatnonzero(distances == distances.min()), key=lambda code: code % 2)]


def definition(x: np.ndarray, block: tuple[int, int], amax: np.float32) -> tuple[np.ndarray, np.ndarray]:
    """Rounded values (multiples of the block scale) and block scales of a float32 matrix of complete blocks."""
    values, (h, w) = np.zeros(x.shape), block
    scales = np.zeros((x.shape[0] // h, x.shape[1] // w))
    with np.errstate(all="ignore"):
        s = np.minimum(F(2688) / amax, FLOAT32_MAX)
        s = F(1) if amax == 0 or s == 0 else s
        for i, j in np.ndindex(scales.shape):
            part = np.s_[i * h : (i + 1) * h, j * w : (j + 1) * w]
            scale = np.abs(x[part]).max() * (s * (F(1) / F(6)))
            scales[i, j] = math.nan if np.isnan(scale) else nearest(float(scale), E4M3)
            encode = np.minimum(F(1) / (F(scales[i, j]) * (F(1) / s)), FLOAT32_MAX)
            scaled = x[part] * encode
            values[part] = [
                [0 if np.isnan(v) else np.copysign(nearest(abs(float(v)), E2M1), v) for v in r] for r in scaled
            ]
    return values, scales


def assert_defined(x: Tensor, block: tuple[int, int], amax: Tensor | None = None) -> None:
    found = nvfp4.quantize(x, block=block, amax=amax)
    array = x.float().numpy()
    expected_amax = np.abs(array).max() if amax is None else F(amax.item())
    values, scales = definition(array, block, expected_amax)
    np.testing.assert_array_equal(found.amax.numpy(), expected_amax)
    np.testing.assert_array_equal(found.scales.float().numpy(), scales)
    np.testing.assert_array_equal(np.array([*E2M1, *(-v for v in E2M1)])[found.codes.numpy()], values)


@given(st.lists(st.floats(width=32), min_size=32, max_size=32), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_any_numbers(numbers: list[float], dtype: str) -> None:
    """Hypothesis likes subnormals, the largest numbers, infinities and NaN."""
    assert_defined(torch.tensor(numbers).reshape(2, 16).to(getattr(torch, dtype)), (1, 16))


@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
@pytest.mark.parametrize("scale", [1.0, 2.0**-140, 2.0**-126, 1e-20, 1e30, 0.0])
@pytest.mark.parametrize("spread", [0.0, 4.0])
def test_random_matrices(block: tuple[int, int], scale: float, spread: float) -> None:
    """With the wide spread, scales of many blocks round to zero."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(32, 32, generator=g) * torch.exp(spread * torch.randn(32, 32, generator=g)) * scale
    assert_defined(x, block)


def test_order_of_operations_of_block_scales() -> None:
    """Other ways to write the formula differ in about one scale in a thousand of bfloat16 data, whose short numbers
    often fall on or beside a tie: enough blocks to see each."""
    g = torch.Generator().manual_seed(10)
    for amax in (torch.rand(60, generator=g) * 10 + 1).bfloat16().float().unbind():
        block_amax = (torch.rand(150, generator=g) * amax).bfloat16().float()
        found = nvfp4.quantize(block_amax[:, None].expand(-1, 16), amax=amax).scales.float().flatten()
        wanted = block_amax.numpy() * (F(2688) / F(amax.item()) * (F(1) / F(6)))
        assert found.tolist() == [nearest(x, E4M3) for x in wanted.tolist()]


def test_ties() -> None:
    """6 in each block makes every factor 1: quarters stay, and halves between codes go to the even one."""
    x = torch.cat([torch.arange(-24, 25) / 4, torch.zeros(15)]).reshape(-1, 16)
    x[:, 0] = 6.0
    found = nvfp4.quantize(x, amax=torch.tensor(6.0 * 448))
    assert (found.scales == 1).all()
    expected = [math.copysign(nearest(abs(v), E2M1), v) for v in x.flatten().tolist()]
    assert torch.equal(found.dequantize().flatten(), torch.tensor(expected))


def test_amax_of_a_larger_tensor() -> None:
    """A shard quantised with the whole tensor's amax is that shard of the whole."""
    x = torch.randn(32, 64, generator=torch.Generator().manual_seed(2))
    whole, shard = nvfp4.quantize(x), nvfp4.quantize(x[4:7], amax=x.abs().max())
    assert torch.equal(shard.codes, whole.codes[4:7])
    assert torch.equal(shard.scales.float(), whole.scales[4:7].float())
    assert_defined(x, (16, 16), amax=torch.tensor(1e5))
    assert_defined(x, (1, 16), amax=torch.tensor(1e-5))


def test_dequantize_is_code_times_scales() -> None:
    x = torch.randn(20, 40, generator=torch.Generator().manual_seed(3))
    for block in ((1, 16), (16, 16)):
        q = nvfp4.quantize(x, block=block)
        row_of, column_of = np.arange(20) // block[0], np.arange(40) // 16
        codes = np.array([*E2M1, *(-v for v in E2M1)])[q.codes.numpy()].astype(F)
        scales = q.scales.float().numpy()[row_of][:, column_of] * q.amax.numpy() * (F(1) / F(2688))
        np.testing.assert_array_equal(q.dequantize().numpy(), codes * scales)
        assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16


def test_values_of_weights_do_not_depend_on_the_direction() -> None:
    """What 16x16 blocks are for: fprop and dgrad, which contract different dimensions, see one weight."""
    w = torch.randn(32, 48, generator=torch.Generator().manual_seed(4))
    transposed = nvfp4.quantize(w.T, block=(16, 16)).dequantize()
    assert torch.equal(transposed.T, nvfp4.quantize(w, block=(16, 16)).dequantize())


def test_error() -> None:
    """Half of the largest gap, 4 to 6, is 1 code unit = block_amax / 6; a scale's own rounding is at most 1/16."""
    x = torch.randn(64, 128, generator=torch.Generator().manual_seed(5))
    error = (nvfp4.quantize(x).dequantize() - x).abs().reshape(64, 8, 16)
    block_amax = x.abs().reshape(64, 8, 16).amax(-1, keepdim=True)
    assert (error <= block_amax * (1 / 6) * (1 + 1 / 16) + 1e-6).all()


@pytest.mark.parametrize("shape", [(1, 1), (5, 17), (33, 40), (2, 3, 24), (7,), (0, 32), (2, 0, 16)])
@pytest.mark.parametrize("block", [(1, 16), (16, 16)])
def test_incomplete_blocks_are_completed_with_zeros(shape: tuple[int, ...], block: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(6))
    q = nvfp4.quantize(x, block=block)
    assert q.codes.shape == q.dequantize().shape == x.shape
    rows, columns = math.prod(shape[:-1]), shape[-1]
    padded = torch.zeros(-(-rows // 16) * 16, -(-columns // 16) * 16)
    padded[:rows, :columns] = x.reshape(rows, columns)
    whole = nvfp4.quantize(padded, block=block)
    assert torch.equal(q.codes.reshape(rows, columns), whole.codes[:rows, :columns])
    block_rows = -(-rows // block[0])
    assert torch.equal(q.scales.reshape(block_rows, -(-columns // 16)).float(), whole.scales[:block_rows].float())
    assert q.scales.shape == ((block_rows, -(-columns // 16)) if block[0] > 1 else (*shape[:-1], -(-columns // 16)))


def test_rotation_comes_first() -> None:
    x = torch.randn(4, 32, generator=torch.Generator().manual_seed(7)).bfloat16()
    found, expected = nvfp4.quantize(x, hadamard=True), nvfp4.quantize(rotate(x))
    assert torch.equal(found.amax, rotate(x).abs().max().float())
    assert torch.equal(found.codes, expected.codes)
    assert not torch.equal(found.codes, nvfp4.quantize(x).codes)


def test_non_finite_input_stays_visible() -> None:
    x = torch.randn(2, 32, generator=torch.Generator().manual_seed(8))
    x[0, 3] = math.nan
    assert nvfp4.quantize(x).dequantize().isnan().all()
    local = nvfp4.quantize(x, amax=torch.tensor(4.0)).dequantize()
    assert local[0, :16].isnan().all()
    assert local[0, 16:].isfinite().all()
    assert local[1].isfinite().all()


def test_stochastic_changes_codes_only_to_neighbours_and_averages_to_the_input() -> None:
    """Scales are the same as with nearest. The mean of n draws is within 5 standard deviations of the input, one being
    at most half of the largest gap (2 code units) over sqrt(n), but where the block scale's rounding saturates it."""
    g = torch.Generator().manual_seed(9)
    x = torch.randn(8, 32, generator=g)
    nearest_q, draws = nvfp4.quantize(x), 400
    mean = torch.zeros_like(x)
    unit = nearest_q.scales.float().repeat_interleave(16, -1) * nearest_q.amax / 2688
    for _ in range(draws):
        q = nvfp4.quantize(x, rounding="stochastic", generator=g)
        assert torch.equal(q.scales.float(), nearest_q.scales.float())
        assert ((q.codes & 7).int() - (nearest_q.codes & 7).int()).abs().max() <= 1
        mean += q.dequantize() / draws
    inside = x.abs() <= 6 * unit
    assert ((mean - x).abs() <= 5 * unit / math.sqrt(draws) + 1e-5)[inside].all()


def test_detaches() -> None:
    x = torch.randn(2, 16, requires_grad=True)
    q = nvfp4.quantize(x, hadamard=True)
    assert not q.dequantize().requires_grad
    assert not q.amax.requires_grad


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: nvfp4.quantize(x.double()), "float64"),
        (lambda x: nvfp4.quantize(x[0, 0]), "last dimension"),
        (lambda x: nvfp4.quantize(x[:, :0]), "last dimension"),
        (lambda x: nvfp4.quantize(x, block=(1, 32)), r"\(1, 16\) or \(16, 16\), not \(1, 32\)"),
        (lambda x: nvfp4.quantize(x, amax=torch.ones(2)), "one float32 number"),
        (lambda x: nvfp4.quantize(x, amax=torch.ones((), dtype=torch.bfloat16)), "one float32 number"),
        (lambda x: nvfp4.quantize(x, rounding="stochastic"), "needs a generator"),
        (lambda x: nvfp4.quantize(x, rounding="up"), "'nearest' or 'stochastic', not 'up'"),
        (lambda x: nvfp4.quantize(x[:, :24], hadamard=True), "divisible by 16"),
    ],
)
def test_refuses(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(4, 32))
