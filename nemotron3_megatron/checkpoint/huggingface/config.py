"""``config.json`` of ``nemotron_h``: written from a model, and compared with one.

Keys and constants are those of the published Nano and Super files.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nemotron3_megatron.checkpoint.huggingface.mapping import mtp_blocks
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig

PUBLISHED_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
"""Special tokens of the published tokenizer."""

FIELDS = {
    "hidden_size": "hidden_size",
    "vocab_size": "vocab_size",
    "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_query_groups",
    "head_dim": "kv_channels",
    "mamba_num_heads": "mamba_num_heads",
    "mamba_head_dim": "mamba_head_dim",
    "ssm_state_size": "mamba_state_dim",
    "n_groups": "mamba_num_groups",
    "chunk_size": "mamba_chunk_size",
    "n_routed_experts": "num_moe_experts",
    "num_experts_per_tok": "moe_router_topk",
    "moe_intermediate_size": "moe_ffn_hidden_size",
    "moe_shared_expert_intermediate_size": "moe_shared_expert_intermediate_size",
    "routed_scaling_factor": "moe_router_topk_scaling_factor",
    "layer_norm_epsilon": "layernorm_epsilon",
}
"""Key of ``config.json`` -> field of the recipe's model."""

CONSTANTS: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "attention_bias": False,
    "conv_kernel": 4,
    "expand": 2,
    "initializer_range": 0.02,  # not what the model was initialised with, in the published files either
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_floor": 1e-4,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    # transformers 5.23 takes time_step_min for a lower bound of the time step in the forward pass, unless this, its
    # older name, is there too. Megatron-Core and mamba-ssm have no bound in training. Other readers ignore the key.
    "mamba_dt_min": 1e-30,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}
"""The same in every Nemotron 3."""

_BEHAVIOUR = (
    "attention_bias",
    "conv_kernel",
    "mamba_hidden_act",
    "mamba_proj_bias",
    "mlp_bias",
    "mlp_hidden_act",
    "n_group",
    "n_shared_experts",
    "norm_topk_prob",
    "tie_word_embeddings",
    "topk_group",
    "use_bias",
    "use_conv_bias",
)
"""Constants that a model to be imported must share."""


def model_config(
    model: ModelConfig, dtype: str = "bfloat16", tokens: Mapping[str, int | None] = PUBLISHED_TOKENS
) -> dict[str, Any]:
    """The whole ``config.json``.

    Args:
        model: the architecture.
        dtype: of the weights, by torch's name.
        tokens: ids of special tokens.

    Raises:
        UserError: ``nemotron_h`` cannot express the model.
    """
    _require_expressible(model)
    config = {
        **CONSTANTS,
        **{key: getattr(model, field) for key, field in FIELDS.items()},
        **tokens,
        "hybrid_override_pattern": model.pattern,
        "num_hidden_layers": len(model.pattern),
        # The published value of models without dense MLPs, which then have no other use for it.
        "intermediate_size": model.ffn_hidden_size or model.moe_ffn_hidden_size,
        "norm_eps": model.layernorm_epsilon,
        "torch_dtype": dtype,
    }
    if model.moe_latent_size:
        config |= {"moe_latent_size": model.moe_latent_size, "moe_shared_expert_overlap": False}
    if model.mtp_depths:
        config |= {"mtp_hybrid_override_pattern": model.mtp_pattern, "num_nextn_predict_layers": mtp_blocks(model)}
    return dict(sorted(config.items()))


def generation_config(tokens: Mapping[str, int | None]) -> dict[str, Any]:
    """``generation_config.json``: special tokens only."""
    return {"_from_model_config": True, **tokens}


def differences(config: Mapping[str, Any], model: ModelConfig) -> list[tuple[str, str, str]]:
    """Rows (key, in ``config.json``, in the recipe) of what makes another function of the same tokens.

    Shapes are not compared here where a tensor has them (the dense MLP, MTP).
    """
    wanted: dict[str, Any] = {key: getattr(model, field) for key, field in FIELDS.items()}
    wanted |= {key: CONSTANTS[key] for key in _BEHAVIOUR} | {"moe_latent_size": model.moe_latent_size}
    if "E" not in model.pattern + model.mtp_pattern:
        wanted = {key: value for key, value in wanted.items() if not ("expert" in key or "moe" in key or "rout" in key)}
    rows = [("layers", _pattern(config), model.pattern)] if _pattern(config) != model.pattern else []
    # A missing key has transformers' default, which is the constant for every one of _BEHAVIOUR.
    found = {key: config.get(key, CONSTANTS.get(key)) for key in wanted}
    return rows + [(key, str(found[key]), str(value)) for key, value in wanted.items() if found[key] != value]


def _pattern(config: Mapping[str, Any]) -> str:
    """From the published key, or from the list of layer kinds that transformers 5 writes."""
    if "hybrid_override_pattern" in config:
        return str(config["hybrid_override_pattern"])
    symbols = {"linear_attention": "M", "mamba": "M", "full_attention": "*", "attention": "*", "moe": "E", "mlp": "-"}
    return "".join(
        symbols.get(kind, "?") for kind in config.get("layers_block_type") or config.get("layer_types") or ()
    )


def _require_expressible(model: ModelConfig) -> None:
    if "E" in model.pattern and not model.moe_shared_expert_intermediate_size:
        raise UserError(
            "model.moe_shared_expert_intermediate_size=null",
            where="run.json",
            why="nemotron_h always has a shared expert beside the routed ones",
        )
    if "M" in model.pattern and model.layernorm_epsilon != 1e-5:
        raise UserError(
            f"model.layernorm_epsilon={model.layernorm_epsilon}",
            where="run.json",
            why="nemotron_h has one epsilon, and the gated norm of Megatron-Core's Mamba layers is fixed at 1e-5",
        )
