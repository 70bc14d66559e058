"""The Nemotron 3 language model: Megatron-Core's HybridModel with a training forward that returns losses by depth.

Shapes: B batch, S local sequence, H hidden, V vocabulary shard, D MTP depths.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import layers as megatron_layers
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from nemotron3_megatron.model.attention import document_params, whole_documents
from nemotron3_megatron.model.layers import RMSNorm
from nemotron3_megatron.model.vocabulary_loss import losses_or_logits


class TorchHybridStack(HybridStack):  # type: ignore[misc]
    """``HybridStack`` whose final norm is ours; Megatron-Core's is Transformer Engine's, whatever the spec says."""

    def __init__(self, *args: Any, post_layer_norm: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, post_layer_norm=False, **kwargs)
        if self.post_process and post_layer_norm:
            self.final_norm = RMSNorm(self.config, self.config.hidden_size, self.config.layernorm_epsilon)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        hidden: Tensor = super().forward(*args, **kwargs)
        if not hasattr(self, "final_norm"):
            return hidden
        normed = self.final_norm(hidden)
        viewless: Tensor = make_viewless_tensor(inp=normed, requires_grad=normed.requires_grad, keep_graph=True)
        return viewless


class Nemotron3Model(HybridModel):  # type: ignore[misc]
    """HybridModel that hands out per-token losses, so that the loss is normalised over the whole global batch.

    Megatron-Core normalises each MTP depth by the token count of one rank's micro-batch (its issue #7452, item 3;
    pull request #7498), which makes gradients depend on how uneven loss masks fall on ranks.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _let_constructor_pass()
        super().__init__(*args, **kwargs)
        if self.post_process:
            # Its own forward makes logits only; gradients are added up by the loss.
            self.output_layer.gradient_accumulation_fusion = False
            self.output_layer.forward = partial(losses_or_logits, self.output_layer)

    def forward(
        self,
        tokens: Tensor | None,
        position_ids: Tensor | None,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        boundaries: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch through this rank's layers.

        Args:
            tokens: (B, S) int64; needed where the embedding lives (first stage, and MTP's stage).
            position_ids: (B, S) int64, as tokens.
            labels: (1 + D, B, S) int64: row d holds the token d + 1 places ahead. None: logits are returned.
            documents: (B, S) int32 index of each token's document; None: one document.
            boundaries: (n + 1,) int32, see ``MicroBatch.boundaries``.

        Returns:
            Losses (1 + D, B, S) float32 on the last stage, logits (B, S, V) there without labels, and hidden
            states (S, B, H) on other stages.
        """
        packed = None
        if documents is not None:
            packed = document_params(whole_documents(documents, self.pg_collection.cp), boundaries)
        embedded = self.embedding(input_ids=tokens, position_ids=position_ids) if self.pre_process else None
        hidden: Tensor = self.decoder(hidden_states=embedded, attention_mask=None, packed_seq_params=packed)
        if not self.post_process:
            return hidden
        if labels is None:
            logits, _ = self.output_layer(hidden, runtime_gather_output=True)
            whole: Tensor = logits.transpose(0, 1).contiguous()
            return whole
        if self.mtp_process:
            hidden = self.mtp(
                input_ids=tokens,
                position_ids=position_ids,
                hidden_states=hidden,
                attention_mask=None,
                packed_seq_params=packed,
                embedding=self.embedding,
            )
        depths = hidden.chunk(labels.shape[0], dim=0)
        return torch.stack([self._token_losses(h, y) for h, y in zip(depths, labels, strict=True)])

    def _token_losses(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Cross entropy of every position: hidden (S, B, H) and labels (B, S) -> (B, S) float32."""
        losses: Tensor = self.output_layer(hidden, labels=labels)
        return losses.float()


def _let_constructor_pass() -> None:
    """Without apex, Megatron's output layer refuses to be built with ``gradient_accumulation_fusion``."""
    megatron_layers._grad_accum_fusion_available = True
