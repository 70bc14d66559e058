"""The published formats by role, on the official recipes; nothing here needs ModelOpt."""

from __future__ import annotations

from collections import Counter

import pytest

from nemotron3_megatron.checkpoint.quantised.published import FORMATS, Settings, attention_layers, narrow_linears
from nemotron3_megatron.config import compose
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig

# Super: 88 layers, of which 40 Mamba, 40 MoE and 8 attention (published config.json).
SUPER = {
    "nvfp4": {"nvfp4": 2 * 40, "fp8": 2 * 40 + 2 * 40},
    "fp8": {"fp8": 3 * 2 * 40},
}


def model_of(recipe: str, *overrides: str) -> ModelConfig:
    return compose([f"recipe={recipe}", *overrides])[0].model


@pytest.mark.parametrize("settings", ["nvfp4", "fp8"])
def test_super(settings: Settings) -> None:
    model = model_of("super_bf16")
    found = narrow_linears(model, settings)
    assert Counter(found.values()) == SUPER[settings]
    # What the tables of both checkpoints keep: attention, latent projections, and MTP.
    assert not [name for name in found if "attention" in name or "latent" in name or name.startswith("mtp.")]
    assert found["decoder.layers.1.mlp.experts.linear_fc1"] == settings
    assert found["decoder.layers.0.mixer.in_proj"] == "fp8"
    assert found["decoder.layers.1.mlp.shared_experts.linear_fc2"] == "fp8"
    assert len(attention_layers(model)) == 8
    assert all(model.pattern[int(name.split(".")[2])] == "*" for name in attention_layers(model))


def test_refuses_what_it_cannot_quantise() -> None:
    model = model_of("tiny", "model.moe_latent_size=40")
    with pytest.raises(UserError, match=r"linear_fc1 has 40 inputs, and NVFP4 needs a multiple of 16"):
        narrow_linears(model, "nvfp4")
    assert narrow_linears(model, "fp8")
    attention_only = model_of(
        "tiny", "model.pattern=*-", "model.ffn_hidden_size=64", "model.mtp_depths=0", "model.mtp_pattern=''"
    )
    with pytest.raises(UserError, match=r"the model has no moe\.experts\.fc1"):
        narrow_linears(attention_only, "nvfp4")


def test_every_role_of_the_decoder_is_decided() -> None:
    """Both settings quantise the same linears; they differ in the routed experts' format only."""
    assert FORMATS["nvfp4"].keys() == FORMATS["fp8"].keys()
    differing = {role for role, narrow in FORMATS["nvfp4"].items() if narrow != FORMATS["fp8"][role]}
    assert differing == {"moe.experts.fc1", "moe.experts.fc2"}
