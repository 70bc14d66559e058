"""Parameters and floating-point operations of each kind of layer: plain arithmetic on a ``ModelConfig``.

The terms follow Megatron-Core's modules (``MambaMixer``, ``SelfAttention``, ``MoELayer``, ``MLP``), norms fused into
their linear included, and reproduce the published totals to the last digit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemotron3_megatron.config.recipe import ModelConfig

Kind = Literal["mamba", "attention", "moe", "mlp"]

KINDS: dict[str, Kind] = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
"""Symbols of a layer pattern (Megatron-Core ``hybrid_layer_allocation.Symbols``)."""

CONV_KERNEL = 4
"""Width of Mamba's causal convolution (Megatron-Core ``MambaMixer`` default; published configs ``conv_kernel``)."""


@dataclass(frozen=True, slots=True)
class LayerSize:
    """Parameters of one layer, its norm included."""

    total: int
    active: int
    """Parameters that one token passes through: the top-k experts instead of all."""


def layer_size(model: ModelConfig, kind: Kind) -> LayerSize:
    """Parameters of one layer of ``kind``."""
    if kind == "moe":
        return _moe(model)
    dense = {"mamba": _mamba, "attention": _attention, "mlp": _mlp}[kind](model)
    return LayerSize(dense, dense)


def _mamba(model: ModelConfig) -> int:
    inner = model.mamba_num_heads * model.mamba_head_dim
    states = 2 * model.mamba_num_groups * model.mamba_state_dim
    in_proj = model.hidden_size * (2 * inner + states + model.mamba_num_heads)
    conv = (inner + states) * (CONV_KERNEL + 1)
    per_head = 3 * model.mamba_num_heads  # A_log, D, dt_bias
    return in_proj + conv + per_head + inner + inner * model.hidden_size + model.hidden_size


def _attention(model: ModelConfig) -> int:
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    return model.hidden_size * (query + key_value) + query * model.hidden_size + model.hidden_size


def _mlp(model: ModelConfig) -> int:
    return 2 * model.hidden_size * (model.ffn_hidden_size or 0) + model.hidden_size


def _moe(model: ModelConfig) -> LayerSize:
    latent = model.moe_latent_size
    expert = 2 * (latent or model.hidden_size) * model.moe_ffn_hidden_size
    projections = 2 * model.hidden_size * (latent or 0)
    shared = 2 * model.hidden_size * (model.moe_shared_expert_intermediate_size or 0)
    router = model.num_moe_experts * (model.hidden_size + 1)  # weight and expert bias
    common = model.hidden_size + router + shared + projections
    return LayerSize(common + model.num_moe_experts * expert, common + model.moe_router_topk * expert)


def mtp_block_size(model: ModelConfig) -> LayerSize:
    """Parameters of one multi-token-prediction block: eh_proj (2H to H), enorm, hnorm, its layers, final norm."""
    layers = [layer_size(model, KINDS[symbol]) for symbol in model.mtp_pattern]
    own = 2 * model.hidden_size**2 + 3 * model.hidden_size
    return LayerSize(own + sum(layer.total for layer in layers), own + sum(layer.active for layer in layers))


def forward_flops(model: ModelConfig, kind: Kind, seq_length: int) -> int:
    """Floating-point operations of one layer's forward pass for one token (a multiply-add counts 2).

    The formula of Megatron's ``num_floating_point_operations`` for hybrid models (``megatron/training/training.py``),
    with Mamba's inner width taken from its heads rather than assumed to be twice the hidden size.
    """
    hidden = model.hidden_size
    if kind == "mamba":
        inner = model.mamba_num_heads * model.mamba_head_dim
        states = 2 * model.mamba_num_groups * model.mamba_state_dim
        projections = 2 * hidden * (3 * inner + states + model.mamba_num_heads)
        return projections + 7 * inner * model.mamba_state_dim  # the scan
    if kind == "attention":
        query = model.num_attention_heads * model.kv_channels
        key_value = 2 * model.num_query_groups * model.kv_channels
        return 2 * hidden * (2 * query + key_value) + 2 * seq_length * query  # causal: half of the square
    if kind == "mlp":
        return 4 * hidden * (model.ffn_hidden_size or 0)
    latent = model.moe_latent_size
    routed = 4 * (latent or hidden) * model.moe_ffn_hidden_size * model.moe_router_topk
    return routed + 4 * hidden * (latent or 0) + 4 * hidden * (model.moe_shared_expert_intermediate_size or 0)


def output_flops(model: ModelConfig) -> int:
    """Forward operations of the output layer for one token, one depth."""
    return 2 * model.hidden_size * model.vocab_size


def mtp_flops(model: ModelConfig, seq_length: int) -> int:
    """Forward operations of all multi-token-prediction depths for one token, their output layers included."""
    layers = sum(forward_flops(model, KINDS[symbol], seq_length) for symbol in model.mtp_pattern)
    return model.mtp_depths * (layers + 4 * model.hidden_size**2 + output_flops(model))
