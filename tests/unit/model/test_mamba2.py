"""The Mamba-2 mixing function against its formula: convolution, softplus, recurrence and gate written out."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron3_megatron.model.mamba2 import mamba2_mix

HEADS, HEAD_DIM, GROUPS, STATE, WIDTH = 4, 3, 2, 5, 4
INNER, MIXED = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE


def draw(dtype: torch.dtype, seq: int = 21) -> list[Tensor]:
    """zxbcdt, conv weight, conv bias, dt_bias, A, D."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, seq, INNER + MIXED + HEADS), (MIXED, WIDTH), (MIXED,), (HEADS,), (HEADS,), (HEADS,)]
    tensors = [torch.randn(s, generator=generator) for s in shapes]
    tensors[4] = -1 - tensors[4].abs()
    return [t.to(dtype).requires_grad_() for t in tensors]


def mix(t: list[Tensor], seq_idx: Tensor | None = None, gate: bool = True) -> Tensor:
    return mamba2_mix(*t, head_dim=HEAD_DIM, num_groups=GROUPS, chunk_size=8, seq_idx=seq_idx, gate=gate)


def defined(t: list[Tensor], gate: bool) -> Tensor:
    zxbcdt, weight, bias, dt_bias, A, D = t
    z, xbc, dt = zxbcdt[..., :INNER], zxbcdt[..., INNER : INNER + MIXED], zxbcdt[..., INNER + MIXED :]
    conv = F.conv1d(xbc.mT, weight.unsqueeze(1), bias, padding=WIDTH - 1, groups=MIXED)[..., : xbc.shape[1]].mT
    conv = conv * torch.sigmoid(conv)
    dt = torch.log1p(torch.exp(dt + dt_bias))
    h: Tensor | float = 0.0
    ys = []
    for s in range(xbc.shape[1]):
        x = conv[:, s, :INNER].reshape(-1, HEADS, HEAD_DIM)
        B, C = (
            conv[:, s, INNER + k * GROUPS * STATE : INNER + (k + 1) * GROUPS * STATE]
            .reshape(-1, GROUPS, STATE)
            .repeat_interleave(HEADS // GROUPS, dim=1)
            for k in (0, 1)
        )
        h = h * torch.exp(dt[:, s] * A)[..., None, None] + torch.einsum("bh,bhp,bhn->bhpn", dt[:, s], x, B)
        ys.append((torch.einsum("bhpn,bhn->bhp", h, C) + D[:, None] * x).flatten(1))
    y = torch.stack(ys, dim=1)
    return y * z * torch.sigmoid(z) if gate else y


@pytest.mark.parametrize("gate", [True, False])
def test_equals_formula_float64(gate: bool) -> None:
    t = draw(torch.float64)
    weights = torch.randn(2, 21, INNER, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours, theirs = mix(t, gate=gate), defined(t, gate)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((y * weights).sum(), t) for y in (ours, theirs)]
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_documents_equal_separate_sequences() -> None:
    """Neither the state nor the convolution crosses a boundary, even one shorter than the kernel."""
    t = draw(torch.float64)
    cuts = [0, 2, 3, 13, 21]
    seq_idx = torch.repeat_interleave(torch.tensor([0, 1, 0, 1]), torch.tensor(cuts).diff()).expand(2, -1)
    parts = [mix([t[0][:, start:stop], *t[1:]]) for start, stop in pairwise(cuts)]
    torch.testing.assert_close(mix(t, seq_idx), torch.cat(parts, dim=1), rtol=1e-10, atol=1e-12)


def test_bfloat16_activations() -> None:
    """bf16 in, bf16 out. The convolution's bf16 rounding (2**-9 relative) enters three factors of each product and
    the result is rounded once more; 16 of these bound their propagation through sums of this size."""
    t = draw(torch.float32)
    low = [t[0].bfloat16(), *t[1:]]
    y, exact = mix(low), mix([low[0].float(), *t[1:]])
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).abs().max() <= 16 * 2.0**-9 * exact.abs().max()


def test_widths_that_do_not_add_up_are_refused() -> None:
    t = draw(torch.float32)
    with pytest.raises(ValueError, match="fit"):
        mix([t[0][..., :-1], *t[1:]])
    with pytest.raises(ValueError, match="fit"):
        mamba2_mix(*t, head_dim=HEAD_DIM, num_groups=3, chunk_size=8)
