"""The router's kernels: the experts that a token is sent to with their gates, and scores for the balancing loss.

Shapes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nemotron3_megatron.platform.checks.kernel import Draw, KernelFamily

TOPK, SCALING, RAISED = 22, 5.0, 8
"""The first two are Super's (``recipes/model/super.yaml``); RAISED experts have a bias: all tokens choose them."""


def _inputs(draw: Draw) -> dict[str, Any]:
    """Logits a fixed distance apart in each token, so that rounding decides nowhere which is larger."""
    tokens, experts = draw.size(4096, 64), draw.size(512, 32)
    ranks = draw.normal(tokens, experts, dtype=torch.float32).argsort(1)
    raised = torch.arange(experts, device=draw.device) % (experts // RAISED) == 0
    return {"logits": 8 * ranks / experts - 4, "raised": raised}


def _kernel(logits: Tensor, raised: Tensor) -> Tensor:
    from transformer_engine.pytorch.router import (
        fused_compute_score_for_moe_aux_loss,
        fused_topk_with_score_function,
    )

    gates, routes = fused_topk_with_score_function(logits, TOPK, False, None, None, SCALING, "sigmoid", raised.float())
    balanced, scores = fused_compute_score_for_moe_aux_loss(logits, TOPK, "sigmoid")
    return _together(gates, routes, scores, balanced)


def router_reference(logits: Tensor, raised: Tensor) -> Tensor:
    """Logits (T, E) and which experts have a bias (E,) -> gates, choices, scores and their choices, (T, 4 E)."""
    gates, routes = gates_reference(logits, TOPK, SCALING, raised.to(logits.dtype))
    balanced, scores = scores_reference(logits, TOPK)
    return _together(gates, routes, scores, balanced)


def gates_reference(logits: Tensor, topk: int, scaling: float, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Gates (T, E), zero where not chosen, and choices (T, E) bool: by biased sigmoids, weighted by unbiased ones."""
    scores = logits.sigmoid()
    routes = _largest(scores + bias, topk)
    chosen = scores * routes
    return scaling * chosen / chosen.sum(1, keepdim=True), routes


def scores_reference(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Choices without a bias (T, E) bool, and each token's sigmoids as shares of their sum (T, E)."""
    scores = logits.sigmoid()
    return _largest(scores, topk), scores / scores.sum(1, keepdim=True)


def _largest(scores: Tensor, topk: int) -> Tensor:
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, scores.topk(topk, dim=1).indices, True)


def _together(gates: Tensor, routes: Tensor, scores: Tensor, balanced: Tensor) -> Tensor:
    return torch.cat([gates, routes.to(gates.dtype), scores, balanced.to(gates.dtype)], dim=1)


# All in float32, whatever the check's type.
ROUTER = KernelFamily(
    needs=("transformer-engine",), inputs=_inputs, kernel=_kernel, reference=router_reference, forward=0, backward=0
)
