"""Experts chosen by fused kernels: what the doctor compares them with is Megatron-Core's function, and what becomes of
their results in training. The kernels themselves need a GPU (``nemotron3 doctor``, ``tests/gpu/test_specs.py``)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from megatron.core.transformer.moe import moe_utils, router
from torch import Tensor

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.model.router import Float32Router
from nemotron3_megatron.platform.checks.router import gates_reference, scores_reference

EXPERTS, TOPK, SCALING = 16, 3, 2.5
MODEL = ModelConfig(
    pattern="E",
    hidden_size=32,
    vocab_size=64,
    num_attention_heads=4,
    num_moe_experts=EXPERTS,
    moe_router_topk=TOPK,
    moe_ffn_hidden_size=16,
    moe_aux_loss_coeff=0.5,
)


def test_the_doctors_reference_is_megatrons_function() -> None:
    logits = torch.randn(64, EXPERTS, dtype=torch.float64)
    bias = torch.randn(EXPERTS, dtype=torch.float32)
    gates, routes = moe_utils.topk_routing_with_score_function(
        logits.float(), TOPK, scaling_factor=SCALING, score_function="sigmoid", expert_bias=bias
    )
    found, chosen = gates_reference(logits, TOPK, SCALING, bias.double())
    torch.testing.assert_close(found.float(), gates)
    assert torch.equal(chosen, routes)
    assert not torch.equal(chosen, gates_reference(logits, TOPK, SCALING, 0 * bias.double())[1]), "the bias decides"
    balanced, scores = moe_utils.compute_routing_scores_for_aux_loss(logits.float(), TOPK, "sigmoid")
    choices, shares = scores_reference(logits, TOPK)
    torch.testing.assert_close(shares.float(), scores)
    assert torch.equal(choices, balanced)


def test_fused_choices_train_as_the_others(
    build: Callable[[ModelConfig], Nemotron3Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates, choices, counts of the expert bias, the balancing loss and the gradients of both, in two sequences."""
    layer: Any = next(module for module in build(MODEL).modules() if isinstance(module, Float32Router))
    hidden = torch.randn(8, 2, 32)
    plain = _passed(layer, hidden)
    calls = _stand_in(monkeypatch)
    monkeypatch.setattr(layer.config, "moe_router_fusion", True)
    for name, value in _passed(layer, hidden).items():
        torch.testing.assert_close(value, plain[name], msg=name)
    assert calls == ["gates", "scores"]
    assert plain["loss"] > 0


def _passed(layer: Any, hidden: Tensor) -> dict[str, Tensor]:
    hidden = hidden.clone().requires_grad_()
    layer.weight.grad = None
    layer.local_tokens_per_expert.zero_()
    losses: list[Tensor] = []
    attach = router.TopKRouter.attach_and_log_load_balancing_loss

    def keep(self: Any, probs: Tensor, coefficient: float, loss: Tensor, *args: Any, **options: Any) -> Tensor:
        losses.append(loss.detach())
        attached: Tensor = attach(self, probs, coefficient, loss, *args, **options)
        return attached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(router.TopKRouter, "attach_and_log_load_balancing_loss", keep)
        gates, routes = layer(hidden)
    (gates * torch.linspace(-1, 1, gates.numel()).view_as(gates)).sum().backward()
    (loss,) = losses
    found = {"gates": gates.detach(), "routes": routes, "loss": loss, "counts": layer.local_tokens_per_expert.clone()}
    return found | {"input": hidden.grad, "weight": layer.weight.grad.clone()}


def _stand_in(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The doctor's references in place of the kernels that choose; the one that sums must not be called."""
    calls: list[str] = []

    def choose(
        logits: Tensor,
        topk: int,
        use_pre_softmax: bool,
        num_groups: None,
        group_topk: None,
        scaling_factor: float,
        score_function: str,
        expert_bias: Tensor,
    ) -> tuple[Tensor, Tensor]:
        calls.append("gates")
        assert (use_pre_softmax, num_groups, group_topk, score_function) == (False, None, None, "sigmoid")
        return gates_reference(logits, topk, scaling_factor, expert_bias)

    def score(logits: Tensor, topk: int, score_function: str) -> tuple[Tensor, Tensor]:
        calls.append("scores")
        assert score_function == "sigmoid"
        return scores_reference(logits, topk)

    monkeypatch.setattr(moe_utils, "HAVE_TE", True)
    monkeypatch.setattr(moe_utils, "fused_topk_with_score_function", choose)
    monkeypatch.setattr(moe_utils, "fused_compute_score_for_moe_aux_loss", score)
    monkeypatch.setattr(moe_utils, "fused_moe_aux_loss", None)
    return calls
