"""Mamba-2 kernels, against the torch modules of the ``torch`` spec in float64.

Shapes: B batch, S sequence, C channels of the convolution, h heads, p head dim, g groups, n state (of Nano: 64, 64, 8,
128, chunks of 128: what Triton tunes here is what training of that model starts with).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.platform.checks.kernel import Draw, KernelFamily

CHUNK, TAPS, EPSILON = 128, 4, 1e-5
DOCUMENTS = 3
PACKAGES = ("mamba-ssm", "causal-conv1d")


def _documents(length: int, device: torch.device) -> Tensor:
    """(1, S) int32: documents that end inside chunks."""
    return (torch.arange(length, device=device) * DOCUMENTS // length).int()[None]


def _conv_inputs(draw: Draw) -> dict[str, Any]:
    length, channels = draw.size(1024, 90), draw.size(6144, 24)
    return {
        "x": draw.normal(1, length, channels),
        "weight": draw.normal(channels, TAPS, scale=0.5),
        "bias": draw.normal(channels, scale=0.1),
        "documents": _documents(length, draw.device),
    }


def _convolution(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor) -> Tensor:
    from causal_conv1d import causal_conv1d_fn

    # Channels last in memory, as the mixer has them: the kernels of documents take nothing else.
    y: Tensor = causal_conv1d_fn(x.transpose(1, 2), weight, bias, seq_idx=documents, activation="silu")
    return y.transpose(1, 2)


def convolution_reference(x: Tensor, weight: Tensor, bias: Tensor, documents: Tensor) -> Tensor:
    """x (B, S, C), weight (C, TAPS), bias (C,), documents (B, S) -> (B, S, C)."""
    from nemotron3_megatron.model.conv import causal_conv1d

    return causal_conv1d(x, weight, bias, seq_idx=documents)


def _mixer_inputs(draw: Draw) -> dict[str, Any]:
    length, heads, width = draw.size(1024, 150), draw.size(64, 4), draw.size(64, 8)
    groups, state = draw.size(8, 2), draw.size(128, 16)
    inner, both = heads * width, 2 * groups * state
    return {
        "zxbcdt": draw.normal(1, length, 2 * inner + both + heads),
        "weight": draw.normal(inner + both, TAPS, scale=0.5),
        "bias": draw.normal(inner + both, scale=0.1),
        # Time steps around 0.01, decay rates 1 to 16: Mamba-2's own start.
        "dt_bias": draw.uniform(heads, low=-5.5, high=-3.5),
        "A": -draw.uniform(heads, low=1, high=16),
        "D": draw.uniform(heads, low=0.5, high=1.5),
        "documents": _documents(length, draw.device),
        "head_dim": width,
        "num_groups": groups,
    }


def _mixer(
    zxbcdt: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    documents: Tensor,
    head_dim: int,
    num_groups: int,
) -> Tensor:
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    y: Tensor = mamba_split_conv1d_scan_combined(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D=D,
        chunk_size=CHUNK,
        activation="silu",
        headdim=head_dim,
        ngroups=num_groups,
        norm_before_gate=False,
        seq_idx=documents,
    )
    return y


def mixer_reference(
    zxbcdt: Tensor,
    weight: Tensor,
    bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    documents: Tensor,
    head_dim: int,
    num_groups: int,
) -> Tensor:
    """zxbcdt (B, S, 2hp + 2gn + h) -> (B, S, hp): convolution, time step, state space, gate."""
    from nemotron3_megatron.model.mamba2 import mamba2_mix

    return mamba2_mix(
        zxbcdt,
        weight,
        bias,
        dt_bias,
        A,
        D,
        head_dim=head_dim,
        num_groups=num_groups,
        chunk_size=CHUNK,
        seq_idx=documents,
    )


def _norm_inputs(draw: Draw) -> dict[str, Any]:
    rows, width, groups = draw.size(2048, 48), draw.size(4096, 64), draw.size(8, 2)
    weight = (1 + draw.normal(width, scale=0.1)).to(draw.dtype)
    return {"x": draw.normal(rows, width), "weight": weight, "group_size": width // groups}


def _group_norm(x: Tensor, weight: Tensor, group_size: int) -> Tensor:
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn

    y: Tensor = rmsnorm_fn(x, weight, None, eps=EPSILON, group_size=group_size, norm_before_gate=False)
    return y


def group_norm_reference(x: Tensor, weight: Tensor, group_size: int) -> Tensor:
    """RMSNorm over groups of channels: (T, C) and (C,) -> (T, C)."""
    from nemotron3_megatron.model.gated_norm import GatedRMSNorm

    norm = GatedRMSNorm(x.shape[1], eps=EPSILON, group_size=group_size, device="meta")
    y: Tensor = torch.func.functional_call(norm, {"weight": weight}, (x,))
    return y


# The result only: taps are few and summed in float32.
CONVOLUTION = KernelFamily(
    needs=("causal-conv1d",),
    inputs=_conv_inputs,
    kernel=_convolution,
    reference=convolution_reference,
    forward=1,
    backward=1,
)
# Forward: x, B and C after the convolution; B with its decay, the chunk's scores and the entering state as factors of
# products; the result. Backward: those but the result; the ungated output and its gradient, the decayed gradient of
# the scores, of B and of the states as factors; the convolution's gradient, the result.
MIXER = KernelFamily(
    needs=PACKAGES, inputs=_mixer_inputs, kernel=_mixer, reference=mixer_reference, forward=7, backward=13
)
GROUP_NORM = KernelFamily(
    needs=("mamba-ssm",), inputs=_norm_inputs, kernel=_group_norm, reference=group_norm_reference, forward=1, backward=1
)
