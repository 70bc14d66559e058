"""Experts: the grouped product with token counts on the device, and the activation weighted by the router.

Shapes: T rows sorted by expert, K inputs, N outputs, E experts, some without rows.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from nemotron3_megatron.platform.checks.kernel import BEFORE, Draw, KernelFamily

SHARES = (3, 0, 8, 1, 2, 0, 5, 13)
"""Of the rows, by expert."""


def _product_inputs(draw: Draw) -> dict[str, Any]:
    rows, k, n = draw.size(8 * 128 + 32, 64), draw.size(2688, 64), draw.size(1856, 48)
    ends = torch.tensor(SHARES).cumsum(0) * rows // sum(SHARES)
    weights = {f"weight{i}": draw.normal(n, k, scale=1 / math.sqrt(k)) for i in range(len(SHARES))}
    return {"x": draw.normal(rows, k), "ends": ends.int().to(draw.device)} | weights


def _grouped_product(x: Tensor, ends: Tensor, **weights: nn.Parameter) -> Tensor:
    from nemotron3_megatron.model.device_counts import DeviceCountsLinear

    class Experts(DeviceCountsLinear, nn.Module):
        """What the product asks of Megatron-Core's grouped linears."""

        num_gemms, fuse_wgrad_accumulation = len(weights), True

    experts = Experts()
    for name, weight in weights.items():
        weight.main_grad = torch.full_like(weight, BEFORE, dtype=torch.float32)  # type: ignore[attr-defined]
        experts.register_parameter(name, weight)
    return experts.forward(x, ends)[0]


def grouped_product_reference(x: Tensor, ends: Tensor, **weights: Tensor) -> Tensor:
    """(T, K), (E,) int32 and E weights (N, K) -> (T, N), one product an expert."""
    counts = ends.diff(prepend=ends.new_zeros(1)).tolist()
    return torch.cat([rows @ weight.T for rows, weight in zip(x.split(counts), weights.values(), strict=True)])


def _activation_inputs(draw: Draw) -> dict[str, Any]:
    rows, width = draw.size(4096, 64), draw.size(1856, 48)
    return {"x": draw.normal(rows, width), "weights": draw.uniform(rows, 1, low=0.1, high=0.5)}


def _weighted_squared_relu(x: Tensor, weights: Tensor) -> Tensor:
    from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl

    y: Tensor = weighted_squared_relu_impl(x, weights)
    return y


def weighted_squared_relu_reference(x: Tensor, weights: Tensor) -> Tensor:
    """(T, N) and (T, 1) -> (T, N)."""
    return x.relu().square() * weights


# One product in each direction; an expert's weight gradient is rounded before it is added into float32.
GROUPED_PRODUCT = KernelFamily(
    needs=("transformer-engine",),
    inputs=_product_inputs,
    kernel=_grouped_product,
    reference=grouped_product_reference,
    forward=1,
    backward=1,
)
# The square and the result; compiled kernels may leave out the former.
WEIGHTED_SQUARED_RELU = KernelFamily(
    needs=("megatron-core",),
    inputs=_activation_inputs,
    kernel=_weighted_squared_relu,
    reference=weighted_squared_relu_reference,
    forward=2,
    backward=2,
    on_cpu=True,
)
