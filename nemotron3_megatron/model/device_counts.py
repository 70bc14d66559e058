"""Experts whose token counts stay on the GPU.

Megatron-Core's dispatcher copies the counts to the CPU in every layer, because its grouped GEMM takes them as numbers
and launches each expert's product apart: the GPU drains, and the CPU is busy launching. ``torch``'s grouped product
reads the counts where they are. What ranks exchange is known on the CPU only after a wait, so with expert parallelism
one copy of the all-to-all's split sizes remains; without it nothing waits, and a CUDA graph can hold the layer.

Shapes: T rows sorted by expert, K inputs, N outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from nemotron3_megatron.model.moe_parts import MoELayerInParts
from nemotron3_megatron.model.wgrad import add_weight_gradients, placeholder, spacing


class DeviceCountsDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Leaves the experts' counts where they are. Tokens of one rank are in the order of experts after one sort."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        """Only the sizes of an exchange between ranks go to the CPU."""
        if self.ep_size > 1:
            super()._maybe_dtoh_and_synchronize(point)
        return tokens_per_expert

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows that came from several ranks are sorted by expert; those of one rank are already."""
        if self.ep_size > 1:
            rows: tuple[Tensor, Tensor, Tensor] = super().dispatch_postprocess(global_input_tokens, global_probs)
            return rows
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Undoes the sort."""
        if self.ep_size > 1:
            hidden_states = super().combine_preprocess(hidden_states)
        return hidden_states


class DeviceCountsMoELayer(MoELayerInParts):
    """Megatron-Core's layer with :class:`DeviceCountsDispatcher`."""

    def __init__(self, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = DeviceCountsDispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
        )


class DeviceCountsGroupedMLP(TEGroupedMLP):  # type: ignore[misc]
    """Grouped experts whose counts are on the GPU: linear, squared ReLU weighted by the router, linear."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows (T, H), counts (E,) and router weights (T,) -> (T, H)."""
        ends = tokens_per_expert.cumsum(0).to(torch.int32)
        hidden, _ = self.linear_fc1(permuted_local_hidden_states, ends)
        weighted = weighted_squared_relu_impl(hidden, permuted_probs.unsqueeze(-1))
        output, _ = self.linear_fc2(weighted, ends)
        return output, None


class DeviceCountsLinear:
    """``forward`` of both grouped linears (in emulation ``EmulatedDeviceCountsForward`` takes its place)."""

    takes_ends = True
    """Cumulative counts, where Megatron-Core's linears take counts."""
    spare_rows = True
    """The last rows may be nobody's: they are neither read nor written."""
    announce: Callable[[Sequence[nn.Parameter]], None] | None = None
    """Tells DDP that these weights' gradients are complete, where it reduces them beside the backward pass. (Through
    autograd, an expert at a time, that takes the CPU 45 microseconds a weight.)"""

    def list_weights_backwards(self: Any) -> None:
        """DDP lays parameters out from the last to the first: then the first expert comes first, and the weights of all
        are one tensor without a copy."""
        for i in reversed(range(self.num_gemms)):
            self._parameters[f"weight{i}"] = self._parameters.pop(f"weight{i}")

    def forward(self: Any, x: Tensor, ends: Tensor) -> tuple[Tensor, None]:
        """Rows (T, K) and the cumulative counts (E,) int32 -> (T, N)."""
        weights = tuple(self._parameters[f"weight{i}"] for i in range(self.num_gemms))
        fused = self.fuse_wgrad_accumulation
        through_autograd = () if fused and x.requires_grad else weights
        announce = None if through_autograd else self.announce
        y: Tensor = _GroupedProduct.apply(x, ends, fused, announce, weights, *through_autograd)  # type: ignore[no-untyped-call]
        return y, None


class DeviceCountsColumnLinear(DeviceCountsLinear, TEColumnParallelGroupedLinear):  # type: ignore[misc]
    """Experts' first linear."""


class DeviceCountsRowLinear(DeviceCountsLinear, TERowParallelGroupedLinear):  # type: ignore[misc]
    """Experts' second linear."""


class _GroupedProduct(torch.autograd.Function):
    """Y = X Wᵀ by expert; dX = dY W; dW = dYᵀ X."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        ends: Tensor,
        fused: bool,
        announce: Callable[[Sequence[nn.Parameter]], None] | None,
        weights: Sequence[nn.Parameter],
        *through_autograd: nn.Parameter,
    ) -> Tensor:
        """``through_autograd``: the weights, or none of them where autograd shall not know their gradients."""
        ctx.save_for_backward(x, ends)
        ctx.fused, ctx.announce, ctx.weights, ctx.through_autograd = fused, announce, weights, len(through_autograd)
        return torch._grouped_mm(x, _stacked(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, ends = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = torch._grouped_mm(dy, _stacked(ctx.weights), offs=ends) if ctx.needs_input_grad[0] else None
        dw: Sequence[Tensor | None] = [None] * ctx.through_autograd
        if any(ctx.needs_input_grad[5:]) or not ctx.through_autograd:
            product = torch._grouped_mm(dy.t(), x, offs=ends)
            if ctx.fused:
                add_weight_gradients(product, ctx.weights)
                dw = [placeholder(weight) for weight in ctx.weights[: ctx.through_autograd]]
                if ctx.announce is not None:
                    ctx.announce(ctx.weights)
            else:
                dw = product.unbind()
        return dx, None, None, None, None, *dw


def _stacked(weights: Sequence[nn.Parameter]) -> Tensor:
    """(E, N, K): a view of DDP's buffer, or where weights are elsewhere a copy, made anew for each product (all layers'
    copies would be as large as the experts themselves)."""
    distance = spacing(weights)
    if distance is None or distance < weights[0].numel():
        return torch.stack([weight.detach() for weight in weights])
    first = weights[0].detach()
    return first.as_strided((len(weights), *first.shape), (distance, *first.stride()))
