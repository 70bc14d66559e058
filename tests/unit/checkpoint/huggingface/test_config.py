"""``config.json`` against the published files, and against what transformers makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoConfig

from nemotron3_megatron.checkpoint.huggingface.config import differences, model_config
from nemotron3_megatron.config import compose
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig

# The published Nano (BF16) and Super (NVFP4) files.
COMMON = {
    "architectures": ["NemotronHForCausalLM"],
    "model_type": "nemotron_h",
    "attention_bias": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "head_dim": 128,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-5,
    "norm_eps": 1e-5,
    "mamba_head_dim": 64,
    "mamba_hidden_act": "silu",
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "max_position_embeddings": 262144,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_groups": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "sliding_window": None,
    "ssm_state_size": 128,
    "tie_word_embeddings": False,
    "time_step_floor": 1e-4,
    "time_step_min": 0.001,
    "time_step_max": 0.1,
    "topk_group": 1,
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
    "vocab_size": 131072,
    "torch_dtype": "bfloat16",
}
NANO = COMMON | {
    "hidden_size": 2688,
    "hybrid_override_pattern": "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 1856,
    "mamba_num_heads": 64,
    "moe_intermediate_size": 1856,
    "moe_shared_expert_intermediate_size": 3712,
    "n_routed_experts": 128,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 52,
    "routed_scaling_factor": 2.5,
}
SUPER = COMMON | {
    "hidden_size": 4096,
    "hybrid_override_pattern": "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*"
    "EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    "intermediate_size": 2688,
    "mamba_num_heads": 128,
    "moe_intermediate_size": 2688,
    "moe_latent_size": 1024,
    "moe_shared_expert_intermediate_size": 5376,
    "moe_shared_expert_overlap": False,
    "mtp_hybrid_override_pattern": "*E",
    "n_routed_experts": 512,
    "num_experts_per_tok": 22,
    "num_hidden_layers": 88,
    "num_nextn_predict_layers": 1,
    "routed_scaling_factor": 5.0,
}


def model_of(recipe: str, *overrides: str) -> ModelConfig:
    return compose([f"recipe={recipe}", *overrides])[0].model


@pytest.mark.parametrize(("recipe", "published"), [("nano_bf16", NANO), ("super_nvfp4", SUPER)])
def test_published_values(recipe: str, published: dict[str, object]) -> None:
    """All of them, and one key more, which lifts transformers' bound of the time step."""
    assert model_config(model_of(recipe)) == published | {"mamba_dt_min": 1e-30}


def test_transformers_reads_it(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(model_config(model_of("super_bf16"))))
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.hybrid_override_pattern == SUPER["hybrid_override_pattern"]
    assert config.mtp_hybrid_override_pattern == "*E"
    assert (config.num_nextn_predict_layers, config.moe_latent_size, config.dtype.itemsize) == (1, 1024, 2)
    assert config.time_step_min == 1e-30, "the time step would be clamped, which training does not do"


def test_what_nemotron_h_cannot_express() -> None:
    with pytest.raises(UserError, match="shared expert"):
        model_config(model_of("tiny", "model.moe_shared_expert_intermediate_size=null"))
    with pytest.raises(UserError, match="epsilon"):
        model_config(model_of("tiny", "model.layernorm_epsilon=1e-6"))


def test_differences_are_named() -> None:
    model = model_of("super_bf16")
    assert differences(SUPER, model) == []
    assert differences(SUPER | {"n_group": 4}, model) == [("n_group", "4", "1")]
    assert ("layers", NANO["hybrid_override_pattern"], model.pattern) in differences(NANO, model)
    rows = {key for key, _, _ in differences(NANO, model)}
    assert {"hidden_size", "moe_latent_size", "routed_scaling_factor"} <= rows


def test_layer_kinds_as_transformers_5_writes_them(tmp_path: Path) -> None:
    model = model_of("nano_bf16")
    (tmp_path / "config.json").write_text(json.dumps(model_config(model)))
    AutoConfig.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    rewritten = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "hybrid_override_pattern" not in rewritten
    assert differences(rewritten, model) == []


def test_without_experts_their_keys_do_not_matter() -> None:
    model = model_of("tiny", "model.pattern=M*", "model.mtp_pattern=''", "model.mtp_depths=0")
    other = model_config(model) | {"n_routed_experts": 3, "moe_intermediate_size": 1}
    assert differences(other, model) == []
    assert differences(other | {"hidden_size": 1}, model) != []
