"""Our model's weights in transformers' ``nemotron_h``: configuration, names and shapes."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from transformers import NemotronHConfig

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.model.hybrid import Nemotron3Model


def their_config(model: ModelConfig) -> NemotronHConfig:
    """transformers' configuration of the same architecture.

    transformers clamps Mamba's dt from below at ``time_step_min``, which Megatron-Core does not: lifted here.
    """
    return NemotronHConfig(
        hybrid_override_pattern=model.pattern,
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.kv_channels,
        intermediate_size=model.ffn_hidden_size,
        mamba_num_heads=model.mamba_num_heads,
        mamba_head_dim=model.mamba_head_dim,
        ssm_state_size=model.mamba_state_dim,
        n_groups=model.mamba_num_groups,
        chunk_size=model.mamba_chunk_size,
        time_step_min=1e-30,
        n_routed_experts=model.num_moe_experts,
        num_experts_per_tok=model.moe_router_topk,
        moe_intermediate_size=model.moe_ffn_hidden_size,
        moe_shared_expert_intermediate_size=model.moe_shared_expert_intermediate_size,
        moe_latent_size=model.moe_latent_size,
        routed_scaling_factor=model.moe_router_topk_scaling_factor,
        layer_norm_epsilon=model.layernorm_epsilon,
        use_cache=False,
        attn_implementation="eager",
        experts_implementation="eager",
    )


def their_names(ours: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Tensors by our names -> the same numbers by transformers' names and shapes; holds for gradients as well."""
    theirs = {
        "model.embeddings.weight": ours["embedding.word_embeddings.weight"],
        "model.norm_f.weight": ours["decoder.final_norm.weight"],
        "lm_head.weight": ours["output_layer.weight"],
    }
    kinds: dict[str, Callable[[dict[str, Tensor], ModelConfig], dict[str, Tensor]]]
    kinds = {"M": _mamba, "*": _attention, "E": _experts, "-": _mlp}
    for index, kind in enumerate(model.pattern):
        prefix = f"decoder.layers.{index}."
        layer = {name.removeprefix(prefix): t for name, t in ours.items() if name.startswith(prefix)}
        theirs |= {f"model.layers.{index}.{name}": t for name, t in kinds[kind](layer, model).items()}
    return theirs


def _mamba(layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    same = ("dt_bias", "A_log", "D", "norm.weight", "in_proj.weight", "out_proj.weight")
    return {
        "norm.weight": layer["mixer.in_proj.layer_norm_weight"],
        "mixer.conv1d.weight": layer["mixer.conv1d_weight"],
        "mixer.conv1d.bias": layer["mixer.conv1d_bias"],
    } | {f"mixer.{name}": layer[f"mixer.{name}"] for name in same}


def _attention(layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Megatron stores, for each key/value head, its query heads, then the key, then the value head."""
    groups, width = model.num_query_groups, model.kv_channels
    qkv = layer["self_attention.linear_qkv.weight"].view(groups, -1, model.hidden_size)
    q, k, v = qkv.split([model.num_attention_heads // groups * width, width, width], dim=1)
    parts = {"q_proj": q, "k_proj": k, "v_proj": v}
    return {
        "norm.weight": layer["self_attention.linear_qkv.layer_norm_weight"],
        "mixer.o_proj.weight": layer["self_attention.linear_proj.weight"],
    } | {f"mixer.{name}.weight": part.reshape(-1, model.hidden_size) for name, part in parts.items()}


def _experts(layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    def stacked(name: str) -> Tensor:
        return torch.stack([layer[f"mlp.experts.{name}.weight{i}"] for i in range(model.num_moe_experts)])

    theirs = {
        "norm.weight": layer["pre_mlp_layernorm.weight"],
        "mixer.gate.weight": layer["mlp.router.weight"],
        "mixer.experts.up_proj": stacked("linear_fc1"),
        "mixer.experts.down_proj": stacked("linear_fc2"),
        "mixer.shared_experts.up_proj.weight": layer["mlp.shared_experts.linear_fc1.weight"],
        "mixer.shared_experts.down_proj.weight": layer["mlp.shared_experts.linear_fc2.weight"],
    }
    if "mlp.router.expert_bias" in layer:  # not among gradients
        theirs["mixer.gate.e_score_correction_bias"] = layer["mlp.router.expert_bias"]
    if model.moe_latent_size:
        for name in ("fc1_latent_proj", "fc2_latent_proj"):
            theirs[f"mixer.{name}.weight"] = layer[f"mlp.{name}.weight"]
    return theirs


def _mlp(layer: dict[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    return {
        "norm.weight": layer["mlp.linear_fc1.layer_norm_weight"],
        "mixer.up_proj.weight": layer["mlp.linear_fc1.weight"],
        "mixer.down_proj.weight": layer["mlp.linear_fc2.weight"],
    }


def transplant(ours: dict[str, Tensor], model: ModelConfig, nemotron_h: ModuleType) -> Any:
    """transformers' model with our weights, a state by our names; every one of its tensors must get a value."""
    theirs = nemotron_h.NemotronHForCausalLM(their_config(model))
    theirs.load_state_dict(their_names(ours, model), strict=True)
    return theirs


def in_double(ours: Nemotron3Model) -> Nemotron3Model:
    """The model with float64 parameters; Mamba layers cast their input to the configured type."""
    for module in ours.modules():
        if hasattr(module, "config"):
            module.config.params_dtype = torch.float64
    return ours.double()


def errors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each tensor relative to its largest value."""
    assert found.keys() == expected.keys()
    return {name: ((found[name].double() - e).abs().max() / e.abs().max()).item() for name, e in expected.items()}
