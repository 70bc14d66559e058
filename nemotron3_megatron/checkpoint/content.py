"""What a checkpoint contains: weights and buffers, Adam's tensors, and each rank's random state."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from nemotron3_megatron.checkpoint import adam, rng
from nemotron3_megatron.model.builder import model_sharded_state

_EXTRA_STATE = re.compile(r"_extra_state\d*$")
"""Transformer Engine's per-module blob (amax histories). Block-scaled formats keep nothing in it, and the
torch spec has none: leaving it out makes checkpoints of both specs interchangeable."""


def layout(chunks: list[MegatronModule]) -> dict[str, int]:
    """World size and parallel sizes that ``chunks`` were built for."""
    groups = unwrapped(chunks[0]).pg_collection
    sizes = {"tp": groups.tp, "cp": groups.cp, "pp": groups.pp, "ep": groups.ep, "etp": groups.expt_tp}
    return {
        "world_size": dist.get_world_size(),
        **{name: group.size() for name, group in sizes.items()},
        "vpp": len(chunks),
    }


def to_save(chunks: list[MegatronModule], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """Everything that a checkpoint holds, as live tensors. A collective."""
    if optimizer is not None:
        adam.gather_weights(optimizer)
        adam.prepare(optimizer)
    return {**sharded(chunks, optimizer), "rng": _rng_shard(rng.capture())}


def sharded(chunks: list[MegatronModule], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
    """Sharded state dict of the live tensors of the model, and of the optimizer if there is one."""
    model = {f"model{index}": _model_tensors(chunk) for index, chunk in enumerate(chunks)}
    if optimizer is None:
        return model
    return {**model, "optimizer": adam.sharded_state(optimizer, model)}


def load(directory: Path, template: dict[str, Any], chunks: list[MegatronModule], *, with_rng: bool) -> None:
    """Read the tensors of ``template`` (from :func:`sharded`) into place. A collective."""
    optimizer = template.get("optimizer")
    models = {name: tensors for name, tensors in template.items() if name != "optimizer"}
    loaded = dist_checkpointing.load({**models, "rng": _rng_shard(None)} if with_rng else models, str(directory))
    for index, chunk in enumerate(chunks):
        missing, unexpected = unwrapped(chunk).load_state_dict(loaded[f"model{index}"], strict=False)
        wrong = [name for name in (*missing, *unexpected) if not _EXTRA_STATE.search(name)]
        if wrong:
            raise RuntimeError(f"the model and its sharded state dict disagree on {wrong}")
    if with_rng:
        rng.restore(loaded["rng"])
    if optimizer is not None:
        # Last: an FP32 parameter is its own master, and weights that were saved in BF16 know less of it.
        dist_checkpointing.load({"optimizer": optimizer}, str(directory))


def unwrapped(chunk: MegatronModule) -> MegatronModule:
    """The model inside Megatron's DDP and Float16Module."""
    module = chunk
    while isinstance(getattr(module, "module", None), torch.nn.Module):
        module = module.module
    return module


def _model_tensors(chunk: MegatronModule) -> dict[str, Any]:
    module = unwrapped(chunk)
    tensors = model_sharded_state(module, module.pg_collection)
    return {name: tensor for name, tensor in tensors.items() if not _EXTRA_STATE.search(name)}


def _rng_shard(state: dict[str, Any] | None) -> ShardedObject:
    return ShardedObject("rng", state, (dist.get_world_size(),), (dist.get_rank(),))
