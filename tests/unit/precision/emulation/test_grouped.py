"""Experts' products without counts on the CPU, against each expert by itself in float64.

Tolerance: a folded scale rounds each factor to float32 (2^-24), and a float32 sum of at most 96 products loses no more
than 96 * 2^-24 of the sum of their magnitudes, which is less than 8 times the norm of these results.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from nemotron3_megatron.precision.emulation import grouped
from nemotron3_megatron.precision.emulation.read import Read
from nemotron3_megatron.precision.operands import Gemms, Operand, gemms
from nemotron3_megatron.precision.policy import Format, Nvfp4
from tests.oracles.products import error, products

INPUTS, OUTPUTS = 64, 96
TOLERANCE = (96 + 2) * 8 * 2**-24
NEAREST = Nvfp4(stochastic_rounding=None)
VARIANTS: list[tuple[Format, Nvfp4]] = [
    ("nvfp4", NEAREST),
    ("nvfp4", Nvfp4(stochastic_rounding=None, hadamard=None, weight_block=(1, 16))),
    ("mxfp8", NEAREST),
]
COUNTS = [[70, 0, 33, 1], [0, 16, 5, 0], [0, 0, 0, 32], [31, 0, 0, 0]]
"""Uneven experts; the first, the last and several without tokens; whole blocks and a row too few."""


def tensors(counts: list[int]) -> tuple[Tensor, Tensor, list[nn.Parameter], Tensor]:
    """x, dy, weights, and the cumulative counts."""
    generator = torch.Generator().manual_seed(sum(counts))
    total = sum(counts)
    x, dy = (torch.randn(total, width, generator=generator) for width in (INPUTS, OUTPUTS))
    # Experts and rows of different sizes: an amax of two experts together would show.
    scales = torch.repeat_interleave(torch.tensor([1.0, 30.0, 0.01, 300.0]), torch.tensor(counts))[:, None]
    weights = [nn.Parameter(torch.randn(OUTPUTS, INPUTS, generator=generator) * 2**i) for i in range(len(counts))]
    return (x * scales).requires_grad_(), dy * scales, weights, torch.tensor(counts).cumsum(0).int()


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(("number_format", "options"), VARIANTS)
def test_products_of_every_expert(number_format: Format, options: Nvfp4, counts: list[int]) -> None:
    x, dy, weights, ends = tensors(counts)
    operands = gemms(number_format, options)
    read = grouped.read_weights(weights, operands)
    y = grouped.grouped_product(x, ends, operands, read, weights, fused=False)
    y.backward(dy)
    assert x.grad is not None
    parts = zip(*(t.split(counts) for t in (x.detach(), y, x.grad, dy)), weights, strict=True)
    for ex, ey, edx, edy, weight in parts:
        assert weight.grad is not None
        if len(ex) == 0:
            assert not weight.grad.any()
            continue
        padded = [F.pad(t, (0, 0, 0, -len(t) % 32)) for t in (ex, edy)]
        py, pdx, pdw = products(padded[0], weight.detach(), padded[1], number_format, options)
        errors = error(ey, py[: len(ex)]), error(edx, pdx[: len(ex)]), error(weight.grad, pdw)
        assert max(errors) < TOLERANCE, errors


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("counts", [*COUNTS, [16, 32, 64, 32], [0, 0, 0, 0]])
def test_experts_begin_with_whole_blocks(counts: list[int], block: int) -> None:
    padding = grouped.padding(torch.tensor(counts).cumsum(0).int(), sum(counts), block)
    heights = padding.offsets.diff().tolist()
    assert padding.rows % block == 0
    assert int(padding.offsets[-1]) == padding.rows
    assert all(height % block == 0 for height in heights)
    assert heights[:-1] == [-(-count // block) * block for count in counts[:-1]]
    x = torch.randn(sum(counts), 3)
    parts = [F.pad(p, (0, 0, 0, h - len(p))) for p, h in zip(x.split(counts), heights, strict=True)]
    assert torch.equal(padding.pad(x), torch.cat(parts))
    assert torch.equal(padding.unpad(padding.pad(x)), x)


def test_gradients_that_nobody_wants_are_not_made() -> None:
    x, dy, weights, ends = tensors(COUNTS[0])
    operands = gemms("nvfp4", NEAREST)
    read = grouped.read_weights(weights, operands)
    frozen = [weight.requires_grad_(False) for weight in weights]
    grouped.grouped_product(x, ends, operands, read, frozen, fused=False).backward(dy)
    assert x.grad is not None
    assert all(weight.grad is None for weight in frozen)
    trained = [weight.requires_grad_() for weight in weights]
    grouped.grouped_product(x.detach(), ends, operands, read, trained, fused=False).backward(dy)
    assert all(weight.grad is not None for weight in trained)


def test_nothing_waits_for_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values: whatever wants one on the CPU, or a shape that depends on one, fails.

    ``read`` is left out: the torch reference splits by counts, the kernels on a GPU do not.
    """

    def shapes(x: Tensor, rows: Operand | None, columns: Operand | None, **_: object) -> tuple[Read | None, ...]:
        return tuple(None if operand is None else Read(torch.empty_like(x), None) for operand in (rows, columns))

    monkeypatch.setattr(grouped, "read", shapes)
    operands: Gemms = gemms("nvfp4", Nvfp4())
    with FakeTensorMode():
        x = torch.empty(104, INPUTS, dtype=torch.bfloat16, requires_grad=True)
        ends = torch.empty(4, dtype=torch.int32)
        weights = [nn.Parameter(torch.empty(OUTPUTS, INPUTS, dtype=torch.bfloat16)) for _ in range(4)]
        y = grouped.grouped_product(x, ends, operands, grouped.read_weights(weights, operands), weights, fused=False)
        y.backward(torch.empty_like(y))
        assert y.shape == (104, OUTPUTS)
        assert x.grad is not None
        assert all(weight.grad is not None for weight in weights)
        with pytest.raises(DataDependentOutputException):
            ends.tolist()
