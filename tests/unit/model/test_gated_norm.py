"""The gated grouped RMSNorm against its formula, one group at a time."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.model.gated_norm import GatedRMSNorm

ROUNDOFF = 2.0**-24
EPS = 1e-5


def defined(x: Tensor, z: Tensor | None, weight: Tensor, group_size: int, norm_before_gate: bool) -> Tensor:
    gate = 1 if z is None else z / (1 + torch.exp(-z))
    value = x if norm_before_gate else x * gate
    parts = [v / torch.sqrt(v.square().sum(-1, keepdim=True) / group_size + EPS) for v in value.split(group_size, -1)]
    out = torch.cat(parts, dim=-1) * weight
    return out * gate if norm_before_gate else out


def case(groups: int, group_size: int, gated: bool, dtype: torch.dtype, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """x, weight and perhaps z as leaves, and the weights of a scalar loss."""
    generator = torch.Generator().manual_seed(seed)
    hidden = groups * group_size
    shapes = [(3, 2, hidden), (hidden,), *([(3, 2, hidden)] if gated else [])]
    leaves = [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]
    return leaves, torch.randn((3, 2, hidden), generator=generator).to(dtype)


def module(leaves: list[Tensor], group_size: int, norm_before_gate: bool) -> GatedRMSNorm:
    norm = GatedRMSNorm(
        leaves[1].numel(), eps=EPS, group_size=group_size, norm_before_gate=norm_before_gate, dtype=leaves[1].dtype
    )
    norm.weight = torch.nn.Parameter(leaves[1].detach().clone())
    return norm


@settings(max_examples=40, deadline=None)
@given(
    groups=st.integers(1, 4),
    group_size=st.integers(1, 6),
    gated=st.booleans(),
    before=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_equals_formula_float64(groups: int, group_size: int, gated: bool, before: bool, seed: int) -> None:
    leaves, upstream = case(groups, group_size, gated, torch.float64, seed)
    x, weight, z = leaves[0], leaves[1], leaves[2] if gated else None
    norm = module(leaves, group_size, before)
    y, expected = norm(x, z), defined(x, z, weight, group_size, before)
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-12)
    inputs = [x, z] if gated else [x]
    found = torch.autograd.grad((y * upstream).sum(), [*inputs, norm.weight])
    wanted = torch.autograd.grad((expected * upstream).sum(), [*inputs, weight])
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_float32_within_derived_bound(before: bool) -> None:
    """The result is a chain of products, so its relative error is a count of roundings.

    silu(z) 4 (exp, add, divide, product), its product with x 1; the mean of squares carries 2 * 5 + 2 from its
    terms and n from their sum, halved by the root, which rounds twice itself; the last two products 2. With the
    gate behind the norm the count is smaller.
    """
    group_size = 32
    leaves, _ = case(4, group_size, True, torch.float32)
    y = module(leaves, group_size, before)(leaves[0], leaves[2])
    expected = defined(*(t.detach().double() for t in (leaves[0], leaves[2], leaves[1])), group_size, before)
    roundings = 5 + (12 + group_size) / 2 + 2 + 2
    assert ((y - expected).abs() <= roundings * ROUNDOFF * expected.abs()).all()


def test_groups_do_not_mix() -> None:
    """A group's output depends on that group alone: a rank that holds whole groups needs no other."""
    leaves, _ = case(4, 8, True, torch.float64)
    x, z = leaves[0].detach(), leaves[2].detach()
    whole = module(leaves, 8, False)(x, z)
    part = GatedRMSNorm(16, eps=EPS, group_size=8, norm_before_gate=False)
    part.weight = torch.nn.Parameter(leaves[1].detach()[8:24])
    torch.testing.assert_close(part(x[..., 8:24], z[..., 8:24]), whole[..., 8:24], rtol=1e-13, atol=0)


def test_defaults_are_one_group_and_unit_weight() -> None:
    norm = GatedRMSNorm(6)
    x = torch.tensor([3.0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(norm(x), x / math.sqrt(9 / 6 + 1e-5))


def test_misfit_is_refused() -> None:
    with pytest.raises(ValueError, match="multiple"):
        GatedRMSNorm(10, group_size=4)
