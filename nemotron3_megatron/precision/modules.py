"""Every module of a model whose GEMMs can be quantised, by role and by name with the global layer number."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.sizes import KINDS, Kind
from nemotron3_megatron.precision.policy import Block, Role

FIXED = {"embedding": "bf16", "output": "bf16", "router": "fp32"}
"""Outside every policy: Megatron-Core consults no precision rule there (``HybridModel``'s embedding and output
layer, ``TopKRouter`` with ``moe_router_dtype``), and the reports' precision tables keep them so."""

LEAVES: dict[Kind, tuple[tuple[Role, str], ...]] = {
    "mamba": (("mamba.in_proj", "mixer.in_proj"), ("mamba.out_proj", "mixer.out_proj")),
    "attention": (("attention.qkv", "self_attention.linear_qkv"), ("attention.proj", "self_attention.linear_proj")),
    "moe": (
        ("moe.latent_down", "mlp.fc1_latent_proj"),
        ("moe.latent_up", "mlp.fc2_latent_proj"),
        ("moe.experts.fc1", "mlp.experts.linear_fc1"),
        ("moe.experts.fc2", "mlp.experts.linear_fc2"),
        ("moe.shared.fc1", "mlp.shared_experts.linear_fc1"),
        ("moe.shared.fc2", "mlp.shared_experts.linear_fc2"),
    ),
    "mlp": (("mlp.fc1", "mlp.linear_fc1"), ("mlp.fc2", "mlp.linear_fc2")),
}
"""Role and name inside a layer (Megatron-Core 0.19.2 ``named_modules()``); a layer's experts are one module."""


@dataclass(frozen=True, slots=True)
class LinearModule:
    """One linear, or the grouped linear of all experts of a layer."""

    name: str
    """Megatron-Core's, with the global layer number: on a pipeline stage it counts from the stage's first layer."""
    role: Role
    block: Block
    layer: int | None
    """Global number in the decoder, from 0; None in MTP."""


@lru_cache(maxsize=8)
def linear_modules(model: ModelConfig) -> tuple[LinearModule, ...]:
    """All modules of the whole model, in the order of the forward pass; the layout plays no part."""
    return (*_decoder(model), *_mtp(model))


def _decoder(model: ModelConfig) -> Iterator[LinearModule]:
    for index, symbol in enumerate(model.pattern):
        for role, leaf in _leaves(model, KINDS[symbol]):
            yield LinearModule(f"decoder.layers.{index}.{leaf}", role, "decoder", index)


def _mtp(model: ModelConfig) -> Iterator[LinearModule]:
    blocks = min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths
    for depth in range(blocks):
        yield LinearModule(f"mtp.layers.{depth}.eh_proj", "mtp.eh_proj", "mtp", None)
        for index, symbol in enumerate(model.mtp_pattern):
            for role, leaf in _leaves(model, KINDS[symbol]):
                name = f"mtp.layers.{depth}.mtp_model_layer.layers.{index}.{leaf}"
                yield LinearModule(name, role, "mtp", None)


def _leaves(model: ModelConfig, kind: Kind) -> Iterator[tuple[Role, str]]:
    absent = {
        "moe.latent": model.moe_latent_size is None,
        "moe.shared": model.moe_shared_expert_intermediate_size is None,
    }
    for role, leaf in LEAVES[kind]:
        if not any(missing and role.startswith(prefix) for prefix, missing in absent.items()):
            yield role, leaf
