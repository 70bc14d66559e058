"""Transformer Engine's linears, as Megatron-Core's column- and row-parallel layers use them in a world of one.

Shapes: T tokens, K inputs, N outputs (of Nano: in-projections and experts).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron3_megatron.platform.checks.kernel import BEFORE, Draw, KernelFamily

EPSILON = 1e-5


def _inputs(draw: Draw) -> dict[str, Any]:
    tokens, k, n = draw.size(512, 64), draw.size(2688, 96), draw.size(3712, 80)
    return {"x": draw.normal(tokens, k), "weight": draw.normal(n, k, scale=1 / math.sqrt(k))}


def _norm_inputs(draw: Draw) -> dict[str, Any]:
    inputs = _inputs(draw)
    return inputs | {"scale": (1 + draw.normal(inputs["x"].shape[1], scale=0.1)).to(draw.dtype)}


def _norm_linear(x: Tensor, weight: nn.Parameter, scale: nn.Parameter) -> Tensor:
    import transformer_engine.pytorch as te

    linear = te.LayerNormLinear(
        weight.shape[1],
        weight.shape[0],
        eps=EPSILON,
        bias=False,
        normalization="RMSNorm",
        params_dtype=weight.dtype,
        parallel_mode="column",
        fuse_wgrad_accumulation=True,
    )
    weight.main_grad = torch.full_like(weight, BEFORE, dtype=torch.float32)  # type: ignore[attr-defined]
    linear.weight, linear.layer_norm_weight = weight, scale
    y: Tensor = linear(x)
    return y


def norm_linear_reference(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """RMSNorm, then the product: (T, K), (N, K) and (K,) -> (T, N)."""
    return F.rms_norm(x, (x.shape[-1],), scale, EPSILON) @ weight.T


def _linear(x: Tensor, weight: nn.Parameter, mode: Literal["column", "row"], fused: bool) -> Tensor:
    import transformer_engine.pytorch as te

    linear = te.Linear(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        params_dtype=weight.dtype,
        parallel_mode=mode,
        fuse_wgrad_accumulation=fused,
    )
    if fused:
        weight.main_grad = torch.full_like(weight, BEFORE, dtype=torch.float32)  # type: ignore[attr-defined]
    linear.weight = weight
    y: Tensor = linear(x)
    return y


def _column_linear(x: Tensor, weight: nn.Parameter) -> Tensor:
    return _linear(x, weight, "column", fused=True)


def _row_linear(x: Tensor, weight: nn.Parameter) -> Tensor:
    return _linear(x, weight, "row", fused=False)


def linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """(T, K) and (N, K) -> (T, N)."""
    return x @ weight.T


# The normed input is rounded, then the product; backward also the gradient of the normed input.
NORM_LINEAR = KernelFamily(
    needs=("transformer-engine",),
    inputs=_norm_inputs,
    kernel=_norm_linear,
    reference=norm_linear_reference,
    forward=2,
    backward=3,
)
COLUMN_LINEAR = KernelFamily(
    needs=("transformer-engine",),
    inputs=_inputs,
    kernel=_column_linear,
    reference=linear_reference,
    forward=1,
    backward=1,
)
ROW_LINEAR = KernelFamily(
    needs=("transformer-engine",),
    inputs=_inputs,
    kernel=_row_linear,
    reference=linear_reference,
    forward=1,
    backward=1,
)
