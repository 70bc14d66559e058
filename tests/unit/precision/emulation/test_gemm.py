"""Emulated products against float64 products of the formats' codes and scales, computed here."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron3_megatron.precision.emulation.gemm import EmulatedGemm, EmulatedGroupedGemm
from nemotron3_megatron.precision.operands import Gemms, gemms
from nemotron3_megatron.precision.policy import Format, Hadamard, Nvfp4
from tests.oracles.products import error, exact, products

NEAREST = Nvfp4(stochastic_rounding=None)
POLICIES: dict[str, tuple[Format, Nvfp4]] = {
    "nvfp4": ("nvfp4", NEAREST),
    "no 2D": ("nvfp4", Nvfp4(stochastic_rounding=None, weight_block=(1, 16))),
    "no rotation": ("nvfp4", Nvfp4(stochastic_rounding=None, hadamard=None)),
    "mxfp8": ("mxfp8", NEAREST),
}

TOLERANCE = 64 * 2**-24
"""Products are exact in float32 sums of at most 128 terms but for rounding: a random walk of sqrt(128) = 11 roundings
of 2^-24 each, of the result's size or less; factor 6 for cancellation, measured on the norm."""


def tensors(tokens: int, n: int, k: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, w, dy = (torch.randn(*s, generator=generator) for s in ((tokens, k), (n, k), (tokens, n)))
    # Rows and columns of different size, so that a wrong direction or a shared amax shows.
    x = x * torch.linspace(-3, 3, tokens).exp()[:, None]
    return x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_(), (dy * torch.linspace(0.1, 9, n)).to(dtype)


@pytest.mark.parametrize("policy", POLICIES)
def test_dense_products(policy: str) -> None:
    number_format, options = POLICIES[policy]
    x, w, dy = tensors(128, 96, 64)
    y = EmulatedGemm(gemms(number_format, options), torch.Generator())(x, w)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    for found, reference in zip((y, dx, dw), products(x, w, dy, number_format, options), strict=True):
        assert error(found.detach(), reference) < TOLERANCE


@pytest.mark.parametrize("policy", POLICIES)
def test_bfloat16_products_are_rounded_once(policy: str) -> None:
    """Every element is the float64 product rounded to BF16, or its neighbour where float32 sums fall across a tie."""
    number_format, options = POLICIES[policy]
    x, w, dy = tensors(128, 96, 64, torch.bfloat16)
    y = EmulatedGemm(gemms(number_format, options), torch.Generator())(x, w)
    found = torch.autograd.grad(y, (x, w), dy)
    # Rotations of rows that span more than 12 binades may differ in the order of their sum; these do not.
    for result, reference in zip((y, *found), products(x, w, dy, number_format, options), strict=True):
        assert result.dtype == torch.bfloat16
        rounded = reference.to(torch.bfloat16)
        assert float((result.detach() != rounded).float().mean()) < 0.005
        torch.testing.assert_close(result.detach(), rounded, rtol=2**-7, atol=1e-5 * float(reference.abs().max()))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("counts", [[64, 32, 32], [50, 0, 77], [1, 2, 0]])
def test_experts_are_quantised_apart(policy: str, counts: list[int]) -> None:
    """Also with counts that are no whole blocks: then as if zeros completed them."""
    number_format, options = POLICIES[policy]
    x, _, dy = tensors(sum(counts), 96, 64)
    weights = [tensors(2, 96, 64)[1].detach().roll(i).mul(i + 1.0).requires_grad_() for i in range(3)]
    y = EmulatedGroupedGemm(gemms(number_format, options), torch.Generator())(x, weights, counts)
    dx, *dw = torch.autograd.grad(y, (x, *weights), dy)
    start = 0
    for count, weight, gradient in zip(counts, weights, dw, strict=True):
        part = slice(start, start + count)
        start += count
        if count == 0:
            assert not gradient.any()
            continue
        padding = torch.zeros(-count % 32, 1)
        rows = [torch.cat([t.detach()[part], padding.expand(-1, t.shape[1])]) for t in (x, dy)]
        ey, edx, edw = products(rows[0], weight.detach(), rows[1], number_format, options)
        assert error(y.detach()[part], ey[:count]) < TOLERANCE
        assert error(dx[part], edx[:count]) < TOLERANCE
        assert error(gradient, edw) < TOLERANCE


def test_stochastic_rounding_is_unbiased_in_the_gradients() -> None:
    """The mean over n draws nears the products with exact gradients, and the weight's own error stays.

    dY has 13.7 % of noise (relative Frobenius, numerics of SR on normal data), so the mean of 64 draws is within
    0.137 / 8 = 1.7 % of its limit; 2.5 % allowed. Without SR dgrad stays 9.5 % away from it.
    """
    options = Nvfp4(hadamard=None)
    x, w, dy = tensors(128, 96, 64)
    product = EmulatedGemm(gemms("nvfp4", options), torch.Generator().manual_seed(0))
    y = product(x, w)
    draws = [torch.autograd.grad(y, (x, w), dy, retain_graph=True) for _ in range(64)]
    dx, dw = (sum(parts) / 64 for parts in zip(*draws, strict=True))
    dx_limit = dy.double() @ exact(w.T.contiguous(), "nvfp4", block=(16, 16)).T
    dw_limit = dy.T.double() @ exact(x.T.contiguous(), "nvfp4").T
    assert error(dx, dx_limit) < 0.025
    assert error(dw, dw_limit) < 0.025
    assert error(draws[0][0], dx_limit) > 0.05


def test_rotation_leaves_the_product_of_wgrad() -> None:
    """With and without it, dW differs by quantisation error only, and neither differs from the plain one by more."""
    x, w, dy = tensors(128, 96, 64)
    plain = dy.T @ x.detach()
    for hadamard in (None, Hadamard()):
        options = Nvfp4(stochastic_rounding=None, hadamard=hadamard)
        y = EmulatedGemm(gemms("nvfp4", options), torch.Generator())(x, w)
        assert error(torch.autograd.grad(y, w, dy)[0], plain.double()) < 0.2


def test_frozen_weights_and_inputs() -> None:
    operands: Gemms = gemms("nvfp4", NEAREST)
    x, w, dy = tensors(33, 96, 64)
    product = EmulatedGemm(operands, torch.Generator())
    with torch.no_grad():
        y = product(x, w)  # 33 tokens: fprop alone has no blocks along tokens
    assert y.shape == (33, 96)
    y = product(x, w.detach())
    (dx,) = torch.autograd.grad(y, x, dy)
    assert dx.shape == x.shape
