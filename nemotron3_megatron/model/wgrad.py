"""Weight gradients added into the FP32 buffers of Megatron-Core's DDP, so that autograd passes none."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
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


def add_weight_gradients(gradients: Tensor, weights: Sequence[Any]) -> None:
    """Add the gradients (E, N, K) of E weights to each one's ``main_grad``."""
    buffers = [weight.main_grad for weight in weights]
    if not _add_at_once(buffers, gradients):
        for buffer, gradient in zip(buffers, gradients, strict=True):
            buffer.add_(gradient)
    for weight in weights:
        weight.grad_added_to_main_grad = True


def _add_at_once(buffers: Sequence[Tensor], gradients: Tensor) -> bool:
    """Whether one kernel did it: on CUDA, where DDP's buckets have cut the buffers nowhere."""
    if not gradients.is_cuda:
        return False
    from nemotron3_megatron.model.kernels.accumulate import add_evenly_spaced

    distance = spacing(buffers)
    if distance is None:
        return False
    add_evenly_spaced(buffers, distance, gradients.contiguous())
    return True


def spacing(tensors: Sequence[Tensor]) -> int | None:
    """Elements from each tensor to the next (negative: backwards); None where they differ, or storages do.

    Args:
        tensors: contiguous, of one shape and type.
    """
    places = [tensor.data_ptr() for tensor in tensors]
    steps = {after - before for before, after in pairwise(places)} or {0}
    # What lies between the ends of one storage is in it; allocations of their own may be neighbours by chance.
    if len(steps) > 1 or tensors[0].untyped_storage().data_ptr() != tensors[-1].untyped_storage().data_ptr():
        return None
    return steps.pop() // tensors[0].element_size()


def placeholder(weight: Any) -> Tensor:
    """What autograd wants for a weight whose ``main_grad`` holds the gradient; DDP ignores it by the mark left."""
    from transformer_engine.pytorch.module.base import get_dummy_wgrad

    weight.grad_added_to_main_grad = True
    zero = getattr(weight, "zero_out_wgrad", False)
    dummy: Tensor = get_dummy_wgrad(list(weight.main_grad.shape), weight.dtype, zero=zero)
    return dummy
