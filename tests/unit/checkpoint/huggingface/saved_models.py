"""Small models whose every tensor is random, saved as training saves them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config import Recipe, Run, compose, resolve
from nemotron3_megatron.evaluate.trained import on_one_rank
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.train.record import write_run_record

STEP = 7


@dataclass(frozen=True)
class Saved:
    """A checkpoint and the weights in it."""

    path: Path
    recipe: Recipe
    run: Run
    weights: dict[str, torch.Tensor]
    """By the model's own names."""


Save = Callable[..., Saved]

EVERY_KIND = (
    "model.pattern=ME*-M",
    "model.hidden_size=64",
    "model.vocab_size=96",
    "model.kv_channels=24",
    "model.ffn_hidden_size=48",
    "model.mamba_head_dim=12",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=40",
    "model.moe_shared_expert_intermediate_size=56",
    "model.moe_latent_size=32",
    "data.tokenizer=null",
)
"""Every layer kind, and no two sizes alike that could be taken for each other."""


def last_of_each(*overrides: str) -> list[str]:
    """Of two overrides of a key, the later."""
    return [f"{key}={value}" for key, value in dict(text.split("=", 1) for text in overrides).items()]


def save_model(run_dir: Path, *overrides: str, recipe: str = "tiny") -> Saved:
    """A checkpoint of an untrained model in ``run_dir``; expert biases and norms are random as well."""
    composed, origins = compose(last_of_each(f"recipe={recipe}", f"run_dir={run_dir}", *overrides))
    run = on_one_rank(resolve(composed, composed.world_size or 1, origins))
    platform = select("cpu")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        (model,) = build_model(run, platform, start_groups(run, platform))
        tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        weights = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for tensor in weights.values():
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        path = CheckpointStore(run_dir).save(STEP, [model], None, {"step": STEP}, keep_last=None)
    finally:
        stop_groups()
    write_run_record(run, platform)
    return Saved(path, composed, run, {name: tensor.detach() for name, tensor in weights.items()})
