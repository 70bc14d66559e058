"""The short causal convolution in front of Mamba-2's state space, in pure torch."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from nemotron3_megatron.model.documents import document_runs


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    seq_idx: Tensor | None = None,
    activation: Literal["silu"] | None = "silu",
) -> Tensor:
    """Depthwise convolution over the last ``width`` positions, then the activation.

    Args:
        x: (b, s, channels).
        weight: (channels, width); the last tap is the current position.
        bias: (channels,).
        seq_idx: (b, s) integers; positions of other documents (before the nearest change of value) count as zero.
        activation: None for the bare convolution.

    Returns:
        Like x, computed in float32 (float64 when x is float64).

    Raises:
        ValueError: an activation other than "silu" and None, or weights that do not fit the channels.
    """
    if activation not in ("silu", None):
        raise ValueError(f"activation must be 'silu' or None, got {activation!r}")
    if weight.dim() != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"x {tuple(x.shape)} wants weight ({x.shape[-1]}, width), got {tuple(weight.shape)}")
    dtype = torch.promote_types(x.dtype, torch.float32)
    runs = None if seq_idx is None else document_runs(seq_idx)
    out: Tensor = _TapSum.apply(x.to(dtype), weight.to(dtype), runs)  # type: ignore[no-untyped-call]
    if bias is not None:
        out = out + bias.to(dtype)
    return (out if activation is None else F.silu(out)).to(x.dtype)


class _TapSum(torch.autograd.Function):
    """out[t] = sum over taps of weight[tap] * x[t - shift], shift = width - 1 - tap, inside one document.

    A few shifted multiply-adds beat torch's grouped convolution on CPU (its backward is 3 to 10 times slower), and
    document boundaries come as a mask on each shift.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, runs: Tensor | None) -> Tensor:
        """x (b, s, channels), weight (channels, width), runs (b, s) document numbers."""
        out = x * weight[:, -1]
        for shift in _shifts(x, weight):
            past = _masked(x[:, :-shift], runs, shift)
            out[:, shift:].addcmul_(past, weight[:, -1 - shift])
        ctx.save_for_backward(x, weight, runs)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, runs = ctx.saved_tensors
        grad_x = grad * weight[:, -1]
        grad_weight = torch.zeros_like(weight)
        grad_weight[:, -1] = (grad * x).sum((0, 1))
        for shift in _shifts(x, weight):
            later = _masked(grad[:, shift:], runs, shift)
            grad_x[:, :-shift].addcmul_(later, weight[:, -1 - shift])
            grad_weight[:, -1 - shift] = (later * x[:, :-shift]).sum((0, 1))
        return grad_x, grad_weight, None


def _shifts(x: Tensor, weight: Tensor) -> range:
    """Shifts of the taps before the current position that reach into the sequence at all."""
    return range(1, min(weight.shape[1], x.shape[1]))


def _masked(t: Tensor, runs: Tensor | None, shift: int) -> Tensor:
    """``t`` (b, s - shift, channels) where positions ``shift`` apart share a document, else 0."""
    if runs is None:
        return t
    same = runs[:, shift:] == runs[:, :-shift]
    return t * same.unsqueeze(-1)
