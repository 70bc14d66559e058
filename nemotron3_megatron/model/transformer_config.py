"""Run -> Megatron-Core ``TransformerConfig``: the one place where recipe fields meet Megatron's."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig

from nemotron3_megatron.config.run import Run

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def transformer_config(run: Run, platform_flags: dict[str, object]) -> TransformerConfig:
    """Megatron-Core's configuration of the whole model under the run's layout.

    ``platform_flags`` are the fields that device and module spec impose (``Platform.megatron_flags``).

    What every Nemotron 3 model shares is written here with its source (facts: Nano, Super and Ultra reports,
    section "architecture"): RMSNorm, squared ReLU without gate, no biases, no dropout, no position embedding,
    sigmoid router in FP32 with an expert bias, loss normalised by tokens.
    """
    model = run.model
    fields: dict[str, Any] = {
        "num_layers": len(model.pattern),
        "is_hybrid_model": True,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size or model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.kv_channels,
        "mamba_num_heads": model.mamba_num_heads,
        "mamba_head_dim": model.mamba_head_dim,
        "mamba_state_dim": model.mamba_state_dim,
        "mamba_num_groups": model.mamba_num_groups,
        "normalization": "RMSNorm",
        "layernorm_epsilon": model.layernorm_epsilon,
        "activation_func": squared_relu,
        "gated_linear_unit": False,
        "add_bias_linear": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "attention_softmax_in_fp32": False,
        "calculate_per_token_loss": True,
        "init_method_std": model.init_method_std,
        # Weights are set by name after building (model/initialize.py).
        "perform_initialization": False,
    }
    fields |= _moe(run) | _mtp(run) | _precision(run) | _parallel(run) | platform_flags
    return TransformerConfig(**fields)


def _moe(run: Run) -> dict[str, Any]:
    model = run.model
    if "E" not in model.pattern + model.mtp_pattern:
        return {}
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": model.moe_shared_expert_intermediate_size,
        "moe_latent_size": model.moe_latent_size,
        "moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss",
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_router_dtype": "fp32",
        "moe_router_fusion": model.moe_router_fusion,
        "moe_token_dispatcher_type": run.parallel.moe_token_dispatcher_type,
    }


def _mtp(run: Run) -> dict[str, Any]:
    model = run.model
    if not model.mtp_depths:
        return {}
    return {"mtp_num_layers": model.mtp_depths, "mtp_use_repeated_layer": model.mtp_use_repeated_layer}


def _precision(run: Run) -> dict[str, Any]:
    dtype = DTYPES[run.precision.dtype]
    return {"params_dtype": dtype, "pipeline_dtype": dtype, "bf16": dtype is torch.bfloat16}


def _parallel(run: Run) -> dict[str, Any]:
    layout, parallel = run.layout, run.parallel
    interleaved = layout.vpp > 1
    fields: dict[str, Any] = {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        "deallocate_pipeline_outputs": True,
        # With two ranks the previous and the next rank coincide and batched sends pair with the wrong receives.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
    }
    if parallel.recompute == "full":
        fields |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif parallel.recompute == "selective":
        fields |= {"recompute_granularity": "selective", "recompute_modules": list(parallel.recompute_modules)}
    return fields
