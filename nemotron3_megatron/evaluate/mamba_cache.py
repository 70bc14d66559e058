"""A Mamba-2 layer that continues from its state: constant work and memory for a token, whatever came before.

Shapes: B rows, S columns of the block, H hidden, h heads, p head dim, g groups, n state size, w convolution width,
c channels of the convolution (h * p + 2 * g * n).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.ssm.mamba_layer import MambaLayer
from torch import Tensor

from nemotron3_megatron.evaluate.block import Block
from nemotron3_megatron.model.conv import causal_conv1d
from nemotron3_megatron.model.ssd import ssd

LONGEST_RECURRENCE = 8
"""Columns up to which the state is advanced one by one; beyond it a chunked scan is cheaper,
unless columns may be taken back."""


class Scan(NamedTuple):
    """Operands of the state space in the type it computes in."""

    x: Tensor
    """(B, S, h, p)"""
    dt: Tensor
    """(B, S, h), 0 where the column does not exist: the state passes unchanged."""
    A: Tensor
    """(h,)"""
    B: Tensor
    """(B, S, g, n)"""
    C: Tensor
    """(B, S, g, n)"""
    D: Tensor
    """(h,) or (h, p)"""


class CachedMamba:
    """``MambaLayer`` with the convolution's last inputs and the state after the last committed column."""

    def __init__(self, layer: MambaLayer, rows: int) -> None:
        mixer = layer.mixer
        self.layer = layer
        heads, groups = mixer.nheads_local_tp, mixer.ngroups_local_tp
        group_width = groups * mixer.d_state
        self.heads, self.groups, self.head_dim = heads, groups, mixer.headdim
        self.widths = [heads * mixer.headdim, heads * mixer.headdim + 2 * group_width, heads]
        self.parts = [heads * mixer.headdim, group_width, group_width]
        weight = mixer.cp.get_conv1d_weight()  # (c, 1, w)
        self.past = weight.shape[-1] - 1
        self.window = weight.new_zeros(rows, self.past, weight.shape[0])
        """(B, w - 1, c) inputs of the convolution; during a block, those of its columns follow."""
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.states = [weight.new_zeros(rows, heads, mixer.headdim, mixer.d_state, dtype=dtype)]
        """[(B, h, p, n)] the state; during a block that may be taken back, one more for every column."""

    def __call__(self, hidden: Tensor, block: Block) -> Tensor:
        """hidden (S, B, H) -> (S, B, H)."""
        mixer = self.layer.mixer
        projected, _ = mixer.in_proj(self.layer.norm(hidden))
        mixed = self._mix(projected.transpose(0, 1), block).transpose(0, 1).contiguous()
        output, _ = mixer.out_proj(mixer.norm(mixed))
        total: Tensor = hidden + output
        return total

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` columns of the block in row b."""
        past = self.past
        if len(set(counts)) == 1:
            self.window = self.window[:, counts[0] : counts[0] + past].clone()
            self.states = [self.states[min(counts[0], len(self.states) - 1)]]
            return
        ends = torch.tensor(counts, device=self.window.device)
        rows = torch.arange(len(counts), device=self.window.device)
        self.window = self.window[rows[:, None], ends[:, None] + torch.arange(past, device=self.window.device)]
        self.states = [torch.stack(self.states)[ends, rows]]

    def _mix(self, zxbcdt: Tensor, block: Block) -> Tensor:
        """The function of ``model.mamba2.mamba2_mix``, continued: (B, S, z + x + B + C + dt) -> (B, S, h * p)."""
        cp = self.layer.mixer.cp
        z, xbc, dt = torch.split_with_sizes(zxbcdt, self.widths, dim=-1)
        if block.valid is not None:
            xbc = xbc.masked_fill(~block.valid[..., None], 0)
        self.window = torch.cat([self.window, xbc], dim=1)
        weight = cp.get_conv1d_weight().squeeze(1)
        x, B, C = causal_conv1d(self.window, weight, cp.get_conv1d_bias())[:, self.past :].split(self.parts, dim=-1)
        dtype = self.states[0].dtype
        step = F.softplus(dt.to(dtype) + cp.get_dt_bias().to(dtype))
        if block.valid is not None:
            step = step * block.valid[..., None]
        scan = Scan(
            torch.unflatten(x.to(dtype), -1, (self.heads, self.head_dim)),
            step,
            -torch.exp(cp.get_A_log().float()).to(dtype),
            torch.unflatten(B.to(dtype), -1, (self.groups, -1)),
            torch.unflatten(C.to(dtype), -1, (self.groups, -1)),
            cp.get_D().to(dtype),
        )
        y = self._scan(scan, block).flatten(-2)
        return (y * F.silu(z.to(dtype))).to(zxbcdt.dtype)

    def _scan(self, scan: Scan, block: Block) -> Tensor:
        """y like x; leaves the new states."""
        if block.revocable or scan.x.shape[1] <= LONGEST_RECURRENCE:
            y, states = recurrence(scan, self.states[0])
            self.states = [self.states[0], *states] if block.revocable else states[-1:]
            return y
        y, last = ssd(
            *scan[:5],
            D=scan.D,
            chunk_size=self.layer.mixer.chunk_size,
            initial_states=self.states[0],
            return_final_states=True,
        )
        self.states = [last]
        return y


def recurrence(scan: Scan, state: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The recurrence of ``model.ssd`` column by column from a state (B, h, p, n).

    Returns:
        y (B, S, h, p) and the S states after each column.
    """
    repeats = scan.x.shape[2] // scan.B.shape[2]
    B, C = (t.repeat_interleave(repeats, dim=2) for t in (scan.B, scan.C))  # (B, S, h, n)
    decay = torch.exp(scan.dt * scan.A)[..., None, None]
    added = (scan.dt[..., None] * scan.x)[..., None] * B[..., None, :]  # (B, S, h, p, n)
    outputs, states = [], []
    for column in range(scan.x.shape[1]):
        state = torch.addcmul(added[:, column], state, decay[:, column])
        states.append(state)
        outputs.append((state @ C[:, column, :, :, None]).squeeze(-1))
    skip = scan.D.reshape(scan.x.shape[2], -1)
    return torch.stack(outputs, dim=1) + scan.x * skip, states
