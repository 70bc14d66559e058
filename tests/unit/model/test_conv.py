"""The causal convolution against its definition, one position and one tap at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.model.conv import causal_conv1d

ROUNDOFF = 2.0**-24


def defined(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """y[t] = silu(bias + sum of weight[tap] * x[t - shift] while no document boundary lies between)."""
    width = weight.shape[1]
    rows = []
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            total = bias
            for shift in range(width):
                if shift > t or (seq_idx is not None and (seq_idx[b, t - shift : t + 1] != seq_idx[b, t]).any()):
                    break
                total = total + weight[:, width - 1 - shift] * x[b, t - shift]
            rows.append(total * torch.sigmoid(total))
    return torch.stack(rows).view(x.shape)


def draw(batch: int, seq: int, channels: int, width: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) for s in ((batch, seq, channels), (channels, width), (channels,))]


def documents(batch: int, seq: int, seed: int) -> Tensor:
    """Boundaries at random, some closer together than the kernel is wide; numbers come back later."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(batch, seq, generator=generator) < 0.3).cumsum(1) % 2


def with_gradients(y: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return [y, *torch.autograd.grad((y * weights).sum(), leaves)]


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 2),
    seq=st.integers(1, 12),
    channels=st.integers(1, 4),
    width=st.integers(1, 5),
    packed=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_definition_float64(batch: int, seq: int, channels: int, width: int, packed: bool, seed: int) -> None:
    leaves = [t.double().requires_grad_() for t in draw(batch, seq, channels, width, seed)]
    seq_idx = documents(batch, seq, seed) if packed else None
    found = with_gradients(causal_conv1d(*leaves, seq_idx=seq_idx), leaves)
    expected = with_gradients(defined(*leaves, seq_idx), leaves)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
def test_float32_within_derived_bound(packed: bool) -> None:
    """Errors against float64, by counting roundings on sums of products of absolute values.

    The convolution sums width + 1 terms: (width + 1) u times the sum S of their absolute values. silu has a slope of
    at most 1.1 and rounds its own result (4 u). Of the gradients, that of silu has error 1.1 u (width + 1) S
    from its argument (its second derivative is at most 1/2) plus 4 u; the rest are sums, over width taps for x and
    over batch * seq positions for weight and bias, of |grad| <= 1.1 |loss weight|.
    """
    width, seq = 4, 65
    x, weight, bias = draw(2, seq, 8, width)
    seq_idx = documents(2, seq, 5) if packed else None
    single = [t.clone().requires_grad_() for t in (x, weight, bias)]
    double = [t.double().requires_grad_() for t in (x, weight, bias)]
    found = with_gradients(causal_conv1d(*single, seq_idx=seq_idx), single)
    expected = with_gradients(defined(*double, seq_idx), double)

    total = causal_conv1d(x.abs(), weight.abs(), bias.abs(), seq_idx=seq_idx, activation=None).double()
    upstream = found[0].new_empty(found[0].shape).normal_(generator=torch.Generator().manual_seed(1)).abs().double()
    grad_error = upstream * (0.5 * (width + 1) * total + 4)
    leaves = [t.double().abs().requires_grad_() for t in (x, weight, bias)]
    plain = causal_conv1d(*leaves, seq_idx=seq_idx, activation=None)
    count = (width + 1, 2 * seq, 2 * seq)
    sums = torch.autograd.grad(plain, leaves, 1.1 * upstream, retain_graph=True)
    errors = torch.autograd.grad(plain, leaves, grad_error)
    limits = [1.1 * (width + 1) * total + 4 * expected[0].abs()]
    limits += [k * s + e for k, s, e in zip(count, sums, errors, strict=True)]
    for f, e, limit in zip(found, expected, limits, strict=True):
        assert ((f.double() - e).abs() <= ROUNDOFF * limit).all()


def test_gradcheck() -> None:
    leaves = [t.double().requires_grad_() for t in draw(2, 6, 2, 4)]
    seq_idx = torch.tensor([[0, 0, 1, 1, 0, 0], [2, 2, 2, 2, 2, 2]])
    assert torch.autograd.gradcheck(lambda *t: causal_conv1d(*t, seq_idx=seq_idx), leaves)


def test_no_activation_and_no_bias() -> None:
    x, weight, _ = draw(1, 9, 3, 4)
    one = torch.zeros_like(weight)
    one[:, -1] = 1.0
    assert torch.equal(causal_conv1d(x, one, None, activation=None), x)


def test_bfloat16_is_the_float32_result_rounded() -> None:
    low = [t.bfloat16() for t in draw(1, 9, 3, 4)]
    assert torch.equal(causal_conv1d(*low), causal_conv1d(*[t.float() for t in low]).bfloat16())


def test_misfits_are_refused() -> None:
    x, weight, bias = draw(1, 5, 3, 4)
    with pytest.raises(ValueError, match="weight"):
        causal_conv1d(x, weight[:2], bias[:2])
    with pytest.raises(ValueError, match="activation"):
        causal_conv1d(x, weight, bias, activation="relu")
