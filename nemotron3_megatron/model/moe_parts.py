"""Experts that take the tokens of a long sequence in parts.

A token is copied for each of its experts, so at great lengths those rows are most of a step's memory. Routing, with its
balancing loss and expert biases, sees the whole sequence as ever; what follows works on tokens one by one and is done,
and in the backward pass recomputed, for some tokens at a time.

Shapes: S positions, B batch, H hidden, E experts of all ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemotron3_megatron.model.parts import expert_bytes, tokens_at_a_time


class MoELayerInParts(MoELayer):  # type: ignore[misc]
    """``MoELayer`` whose memory is bounded (``parts.EXPERT_BYTES``)."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(S, B, H) -> (S, B, H), bias None."""
        length, batch = hidden_states.shape[:2]
        config = self.config
        hidden = config.moe_ffn_hidden_size // config.expert_tensor_parallel_size
        width = config.moe_latent_size or config.hidden_size
        row_bytes = expert_bytes(config.moe_router_topk, width, hidden, hidden_states.element_size())
        part = tokens_at_a_time(length, batch * row_bytes)
        if part == length or intermediate_tensors is not None:
            whole: tuple[Tensor, Tensor | None] = super().forward(hidden_states, intermediate_tensors, padding_mask)
            return whole
        mask = None if padding_mask is None else padding_mask.transpose(0, 1).bool()
        probs, routes = self.route(hidden_states, mask)
        parts = zip(hidden_states.split(part), probs.split(part * batch), routes.split(part * batch), strict=True)
        outputs = [checkpoint(self._experts, *each, use_reentrant=False, preserve_rng_state=False) for each in parts]
        return torch.cat(outputs), None

    def _experts(self, hidden_states: Tensor, probs: Tensor, routes: Tensor) -> Tensor:
        """All of the layer behind the router: hidden_states (s, B, H), probs and routes (s * B, E) -> (s, B, H)."""
        shared = self.shared_experts_compute(hidden_states)
        rows, gates = self.dispatch(*self.preprocess(hidden_states, probs, routes))
        output, _ = self.routed_experts_compute(rows, gates)
        combined: Tensor = self.postprocess(self.combine(output), shared)
        return combined
