"""What ranks do in the tests of trainable parameters; plain JSON for the test to judge."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from layouts import batches, started
from tiny import tiny_run

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.train.step import train_step
from nemotron3_megatron.train.trainable import global_names

CASES: dict[str, list[str]] = {
    "all": [],
    "mtp": [r"^mtp\.", "embedding"],
    "experts": ["experts"],
    "router": ["router"],
    "nothing": ["no_such_parameter"],
    "a bias": [r"^decoder\..*expert_bias$"],
}


def check_all(options: dict[str, Any]) -> dict[str, Any]:
    """Every case in a world of its own: which tensors two steps changed, and the gradient norm of the first."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for offset, (name, trainable) in enumerate(CASES.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        try:
            with started(options, partial(_run, trainable=trainable)) as trainer:
                before = _values(trainer.chunks)
                norms = [
                    train_step(trainer, batches(trainer, step), trainer.run.stages[0], 1e-2).update.grad_norm
                    for step in range(2)
                ]
                after = _values(trainer.chunks)
                changed = {key: not torch.equal(before[key], after[key]) for key in before}
                results[name] = {"changed": changed, "grad_norm": norms[0]}
        except UserError as error:
            results[name] = str(error)
    return results


def _run(world_size: int, *, trainable: Sequence[str], **options: Any) -> Run:
    return replace(tiny_run(world_size, **options), trainable=tuple(trainable))


def _values(chunks: Sequence[Any]) -> dict[str, torch.Tensor]:
    """Copies of all parameters and expert biases by global name."""
    found = {}
    for chunk in chunks:
        names = global_names(chunk)
        for tensor in (*chunk.parameters(), *(b for n, b in chunk.named_buffers() if n.endswith("expert_bias"))):
            found[names[id(tensor)]] = tensor.detach().clone()
    return found
