"""A model of every layer kind, small enough to compare number by number."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from nemotron3_megatron.config.recipe import ModelConfig

PATTERN = "MEM*-ME*M-E"
"""Every layer kind, each after different neighbours."""


def every_layer_kind(latent: int | None, **changes: Any) -> ModelConfig:
    """``latent``: width that experts work in; None: the hidden size."""
    model = ModelConfig(
        pattern=PATTERN,
        hidden_size=32,
        vocab_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=12,
        ffn_hidden_size=40,
        mamba_num_heads=8,
        mamba_head_dim=6,
        mamba_state_dim=10,
        mamba_num_groups=2,
        mamba_chunk_size=16,
        num_moe_experts=8,
        moe_router_topk=3,
        moe_ffn_hidden_size=24,
        moe_shared_expert_intermediate_size=20,
        moe_latent_size=latent,
        moe_aux_loss_coeff=0.0,
        init_method_std=0.2,
    )
    return replace(model, **changes)
