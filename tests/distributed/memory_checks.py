"""What ranks do in the memory tests: bytes of real weights, gradient buffers and optimizer state, after one step."""

from __future__ import annotations

import os
from typing import Any

import torch
from layouts import batches, started
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from nemotron3_megatron.checkpoint.adam import parts
from nemotron3_megatron.train.step import Trainer, train_step


def held(worlds: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each layout: bytes on this rank, and its place in the groups that share optimizer state."""
    port = int(os.environ["MASTER_PORT"])
    results = []
    for offset, options in enumerate(worlds):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options) as trainer:
            train_step(trainer, batches(trainer, 0), trainer.run.stages[0], 1e-3)
            results.append(_held(trainer))
    return results


def _held(trainer: Trainer) -> dict[str, Any]:
    groups = trainer.groups
    buffers = [b for m in trainer.model for b in (*m.buffers, *m.expert_parallel_buffers)]
    weights = [b.param_data for b in buffers if b.param_data is not None] or [
        p for chunk in trainer.chunks for p in chunk.parameters()
    ]
    routers = [b for chunk in trainer.chunks for b in chunk.buffers()]
    return {
        "pp": groups.pp.rank(),
        "dense": groups.dp_cp.rank(),
        "expert": groups.expt_dp.rank(),
        "weights": _bytes([*weights, *routers]),
        "gradients": _bytes([b.grad_data for b in buffers]),
        "optimizer": sum(_state_bytes(part) for part in parts(trainer.optimizer)),
    }


def _state_bytes(part: Any) -> int:
    """Moments, and masters that are no view of a parameter."""
    state = part.optimizer.state.values()
    moments = [each[name] for each in state for name in ("exp_avg", "exp_avg_sq")]
    masters: list[torch.Tensor | None] = []
    if isinstance(part, DistributedOptimizer):
        masters = [p for group in part.shard_fp32_from_float16_groups for p in group]
    elif hasattr(part, "fp32_from_float16_groups"):
        masters = [p for group in part.fp32_from_float16_groups for p in group]
    return _bytes([*moments, *(master for master in masters if master is not None)])


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
