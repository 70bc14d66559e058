"""Experts that are all on this rank: token counts stay on the GPU, so that nothing waits for the CPU.

Megatron-Core's dispatcher copies the counts to the CPU in every layer, because its grouped GEMM takes them as numbers:
the GPU drains each time, and no CUDA graph can hold the layer. With one expert- and tensor-parallel rank the number of
rows is known beforehand (tokens times top-k), and ``torch``'s grouped product reads the counts where they are.

Shapes: T rows sorted by expert, K inputs, N outputs, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.extensions.transformer_engine import TEColumnParallelGroupedLinear, TERowParallelGroupedLinear
from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl
from megatron.core.transformer.moe.experts import TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from nemotron3_megatron.model.wgrad import add_weight_gradients


class LocalTokenDispatcher(MoEAlltoAllTokenDispatcher):  # type: ignore[misc]
    """Sorts tokens by expert and back; they are at their rank and in the order of experts already."""

    def _maybe_dtoh_and_synchronize(self, point: str, tokens_per_expert: Tensor | None = None) -> Tensor | None:
        """Counts stay on the GPU."""
        return tokens_per_expert

    def dispatch_postprocess(self, global_input_tokens: Tensor, global_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of one rank need no second sort."""
        return global_input_tokens, self.tokens_per_expert, global_probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """Nothing was sorted."""
        return hidden_states


class LocalMoELayer(MoELayer):  # type: ignore[misc]
    """Megatron-Core's layer with :class:`LocalTokenDispatcher`."""

    def __init__(self, *args: Any, pg_collection: Any = None, **kwargs: Any) -> None:
        super().__init__(*args, pg_collection=pg_collection, **kwargs)
        self.token_dispatcher = LocalTokenDispatcher(
            self.num_local_experts, self.local_expert_indices, config=self.config, pg_collection=pg_collection
        )


class LocalGroupedMLP(TEGroupedMLP):  # type: ignore[misc]
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


class LocalGroupedLinear:
    """``forward`` of both grouped linears (in emulation ``EmulatedLocalForward`` takes its place)."""

    takes_ends = True
    """Cumulative counts, where Megatron-Core's linears take counts."""

    def forward(self: Any, x: Tensor, ends: Tensor) -> tuple[Tensor, None]:
        """Rows (T, K) and the cumulative counts (E,) int32 -> (T, N)."""
        weights = [self.get_parameter(f"weight{i}") for i in range(self.num_gemms)]
        y: Tensor = _GroupedProduct.apply(x, ends, self.fuse_wgrad_accumulation, *weights)  # type: ignore[no-untyped-call]
        return y, None


class LocalColumnLinear(LocalGroupedLinear, TEColumnParallelGroupedLinear):  # type: ignore[misc]
    """Experts' first linear."""


class LocalRowLinear(LocalGroupedLinear, TERowParallelGroupedLinear):  # type: ignore[misc]
    """Experts' second linear."""


class _GroupedProduct(torch.autograd.Function):
    """Y = X Wᵀ by expert; dX = dY W; dW = dYᵀ X."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ends: Tensor, fused: bool, *weights: nn.Parameter) -> Tensor:
        stacked = torch.stack([weight.detach() for weight in weights])
        ctx.save_for_backward(x, ends, stacked)
        ctx.fused, ctx.weights = fused, weights
        return torch._grouped_mm(x, stacked.transpose(1, 2), offs=ends)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, ends, stacked = ctx.saved_tensors
        dy = gradients[0].contiguous()
        dx = torch._grouped_mm(dy, stacked, offs=ends) if ctx.needs_input_grad[0] else None
        dw: Sequence[Tensor | None] = [None] * len(ctx.weights)
        if any(ctx.needs_input_grad[3:]):
            dw = torch._grouped_mm(dy.t(), x, offs=ends).unbind()
            if ctx.fused:
                dw = add_weight_gradients(dw, ctx.weights)
        return dx, None, None, *dw
