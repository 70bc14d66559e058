"""LatentMoE on torch layers: Megatron-Core's MoE layer with the latent projections as torch linears."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.moe import moe_layer

from nemotron3_megatron.model.layers import DuplicatedLinear
from nemotron3_megatron.model.moe_parts import MoELayerInParts


class TorchMoELayer(MoELayerInParts):
    """``MoELayer`` whose ``fc1_latent_proj`` and ``fc2_latent_proj`` need no Transformer Engine."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        _let_constructor_pass()
        super().__init__(*args, **kwargs)
        config = self.config
        if config.moe_latent_size:
            common: dict[str, Any] = {"parallel_mode": "duplicated", "config": config, "bias": False}
            self.fc1_latent_proj = DuplicatedLinear(config.hidden_size, config.moe_latent_size, **common)
            self.fc2_latent_proj = DuplicatedLinear(config.moe_latent_size, config.hidden_size, **common)


def _let_constructor_pass() -> None:
    """Without Transformer Engine, Megatron's constructor refuses latent projections (moe_layer.py asserts)."""
    if not moe_layer.HAVE_TE:
        moe_layer.HAVE_TE = True
        moe_layer.TELinear = DuplicatedLinear
