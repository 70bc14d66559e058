"""The router in FP32: weight, input and logits; choosing experts by fused kernels, and adding up in a fixed order."""

from __future__ import annotations

from megatron.core.transformer.moe.moe_utils import (
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Float32Router(TopKRouter):  # type: ignore[misc]
    """``TopKRouter`` with an FP32 weight in a BF16 model (``builder.FLOAT32_PARAMETERS``).

    Megatron-Core rounds the weight to the model's type and only multiplies in FP32; its fused GEMM refuses
    operands of two types, so the input is widened first.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Hidden states (S, B, H) -> logits (S, B, experts) float32."""
        logits: Tensor = super().gating(input.to(self.weight.dtype))
        return logits

    def _apply_seq_aux_loss(
        self,
        probs: Tensor,
        scores_for_aux_loss: Tensor,
        routing_map: Tensor,
        seq_length: int,
        bsz: int,
        with_padding_mask: bool = False,
    ) -> Tensor:
        """Attach the balancing loss to probs (S * B, E), summed by torch whatever ``moe_router_fusion`` says.

        Transformer Engine's kernel for it adds up in no fixed order (Megatron-LM pull request #6967): no run would give
        the same gradients twice. The kernels that choose experts do.
        """
        coefficient = self.get_aux_loss_coeff("seq_aux_loss")
        if not coefficient:
            return probs
        # A sequence's experts are columns of their own: each sequence is balanced by itself.
        scores, routes = (each.reshape(seq_length, -1) for each in (scores_for_aux_loss, routing_map))
        group, topk = self.tp_cp_group, self.topk
        counts, tokens, all_tokens = get_tokens_per_expert_and_token_count(routes, group, topk * bsz, with_padding_mask)
        loss = switch_load_balancing_loss_func(
            scores, counts, all_tokens, topk, self.config.num_moe_experts, coefficient, fused=False
        )
        attached: Tensor = self.attach_and_log_load_balancing_loss(
            probs, coefficient, loss / bsz, "seq_load_balancing_loss", group, valid_token_count=tokens * bsz
        )
        return attached
