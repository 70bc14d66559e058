"""Mamba-2's mixing of positions as one function: convolution, selective state space, gate."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nemotron3_megatron.model.conv import causal_conv1d
from nemotron3_megatron.model.documents import document_runs
from nemotron3_megatron.model.ssd import ssd


def mamba2_mix(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    *,
    head_dim: int,
    num_groups: int,
    chunk_size: int,
    seq_idx: Tensor | None = None,
    gate: bool = True,
) -> Tensor:
    """What lies between Mamba-2's input projection and its norm; mamba-ssm's ``mamba_split_conv1d_scan_combined``.

    The same function as that kernel without its optional norm and output projection: convolution and SiLU over
    (x, B, C), dt = softplus(dt + dt_bias), the state space, then y * silu(z).

    Args:
        zxbcdt: (b, s, 2 * h * p + 2 * g * n + h), the input projection's output, in this order.
        conv_weight, conv_bias: (h * p + 2 * g * n, width) and (h * p + 2 * g * n,).
        dt_bias: (h,).
        A: (h,) negative, -exp(A_log).
        D: (h,) or (h, p).
        head_dim, num_groups: p and g; the state size n follows from the shapes.
        chunk_size: see :func:`nemotron3_megatron.model.ssd.ssd`.
        seq_idx: (b, s) integers; neither convolution nor state crosses a change of value.
        gate: False leaves y ungated, for a norm that takes z itself.

    Returns:
        (b, s, h * p) in the type of zxbcdt. As in the kernel, activations after the convolution have the input's
        type, and dt and the state space at least float32.

    Raises:
        ValueError: the widths do not add up.
    """
    heads = A.shape[0]
    inner = heads * head_dim
    group_width, state = _group_widths(zxbcdt, conv_weight, heads, head_dim, num_groups)
    runs = None if seq_idx is None else document_runs(seq_idx)
    z, xbc, dt = torch.split_with_sizes(zxbcdt, [inner, inner + 2 * group_width, heads], dim=-1)
    xbc = causal_conv1d(xbc, conv_weight, conv_bias, seq_idx=runs)
    x, B, C = torch.split_with_sizes(xbc, [inner, group_width, group_width], dim=-1)
    dtype = torch.promote_types(zxbcdt.dtype, torch.float32)
    y = ssd(
        torch.unflatten(x, -1, (heads, head_dim)).to(dtype),
        F.softplus(dt.to(dtype) + dt_bias.to(dtype)),
        A.to(dtype),
        torch.unflatten(B, -1, (num_groups, state)),
        torch.unflatten(C, -1, (num_groups, state)),
        D=D,
        chunk_size=chunk_size,
        seq_idx=runs,
    ).flatten(-2)
    if gate:
        y = y * F.silu(z.to(dtype))
    return y.to(zxbcdt.dtype)


def _group_widths(zxbcdt: Tensor, conv_weight: Tensor, heads: int, head_dim: int, num_groups: int) -> tuple[int, int]:
    """g * n and n."""
    inner = heads * head_dim
    group_width, rest = divmod(zxbcdt.shape[-1] - 2 * inner - heads, 2)
    state, odd = divmod(group_width, num_groups)
    if rest or odd or state < 1 or conv_weight.shape[0] != inner + 2 * group_width:
        raise ValueError(
            f"zxbcdt {tuple(zxbcdt.shape)} and conv_weight {tuple(conv_weight.shape)} do not fit "
            f"{heads} heads of {head_dim} and {num_groups} groups"
        )
    return group_width, state
