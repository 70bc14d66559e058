"""Weight gradients added into the FP32 buffers of Megatron-Core's DDP, so that autograd passes none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def weight_gradient(dy: Tensor, x: Tensor, weight: Tensor, *, fused: bool) -> Tensor:
    """dW = dYᵀ X.

    Args:
        dy: (T, N).
        x: (T, K).
        weight: (N, K); with ``fused`` its ``main_grad`` (N, K) float32 receives the gradient.
        fused: add into ``main_grad`` with Transformer Engine's GEMM, which saves a pass over gradient and buffer.

    Returns:
        The gradient, or with ``fused`` a placeholder that autograd wants and DDP ignores.
    """
    if not fused:
        return dy.T @ x
    from transformer_engine.pytorch.cpp_extensions import general_gemm

    main_grad: Tensor = weight.main_grad  # type: ignore[attr-defined]
    general_gemm(x, dy, out_dtype=torch.float32, layout="NT", out=main_grad, accumulate=True, grad=True)
    return placeholder(weight)


def add_weight_gradients(gradients: Sequence[Tensor], weights: Sequence[Any]) -> list[Tensor]:
    """Add each gradient to its weight's ``main_grad``.

    Returns:
        Placeholders that autograd wants and DDP ignores.
    """
    for gradient, weight in zip(gradients, weights, strict=True):
        weight.main_grad.add_(gradient)
    return [placeholder(weight) for weight in weights]


def placeholder(weight: Any) -> Tensor:
    """What autograd wants for a weight whose ``main_grad`` holds the gradient; DDP ignores it by the mark left."""
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    dummy: Tensor = get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype, zero=zero)
    return dummy
