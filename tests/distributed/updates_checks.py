"""What ranks do in the test of prepared updates: train twice from the same weights, once by each way of updating."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from layouts import batches, started
from torch import Tensor

from nemotron3_megatron.checkpoint import adam
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.train.step import train_step
from nemotron3_megatron.train.updates import (
    MegatronUpdates,
    PreparedUpdates,
    TransformerEngineKernels,
)


class ReferenceKernels:
    """AdamW and scaling written out; ``calls`` notes which were used."""

    def __init__(self) -> None:
        self.calls: set[str] = set()

    def scale(self, tensors: list[Tensor], factor: float) -> None:
        self.calls.add("scale")
        for tensor in tensors:
            tensor.mul_(factor)

    def adam(self, lists: list[list[Tensor]], group: dict[str, Any]) -> None:
        self.calls.add("halves" if len(lists) == 5 else "wholes")
        (beta1, beta2), step = group["betas"], group["step"]
        for gradient, weight, first, second, *masters in zip(*lists, strict=True):
            master = masters[0] if masters else weight
            first.mul_(beta1).add_(gradient, alpha=1 - beta1)
            second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            denominator = (second / (1 - beta2**step)).sqrt_().add_(group["eps"])
            master.mul_(1 - group["lr"] * group["weight_decay"])
            master.sub_(group["lr"] / (1 - beta1**step) * first / denominator)
            weight.copy_(master)


def compare(worlds: dict[str, dict[str, Any]], ours: str = "reference") -> dict[str, dict[str, Any]]:
    """For each layout: norms and losses of three steps by Megatron-Core and by prepared lists, and masters' distance.

    ``ours``: ``reference``, or ``transformer_engine`` for its kernels.
    """
    port = int(os.environ["MASTER_PORT"])
    results = {}
    for offset, (name, options) in enumerate(worlds.items()):
        kernels = ReferenceKernels()
        seen = []
        for turn in range(2):
            os.environ["MASTER_PORT"] = str(port + 2 * offset + turn)
            with started(options) as trainer:
                own = kernels if ours == "reference" else TransformerEngineKernels()
                updates = PreparedUpdates(trainer.optimizer, own) if turn else MegatronUpdates(trainer.optimizer)
                trainer = replace(trainer, updates=updates)
                steps = [train_step(trainer, batches(trainer, i), trainer.run.stages[0], 1e-2) for i in range(3)]
                masters = [p.detach().clone() for part in adam.parts(trainer.optimizer) for p in part.get_parameters()]
                weights = [p.detach().float() for chunk in trainer.chunks for p in chunk.parameters()]
                seen.append((steps, masters, weights))
        (first, first_masters, first_weights), (second, second_masters, second_weights) = seen
        results[name] = {
            "calls": sorted(kernels.calls),
            "norms": [[step.update.grad_norm for step in steps] for steps in (first, second)],
            "losses": [[step.losses[0] for step in steps] for steps in (first, second)],
            "masters": _farthest(first_masters, second_masters),
            "weights": _farthest(first_weights, second_weights),
        }
    return results


def _farthest(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True) if x.numel())


def resumed(folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """A third step after two, in one go and from a checkpoint: how far masters and moments are apart, and how many."""
    port = int(os.environ["MASTER_PORT"])
    store = CheckpointStore(Path(folder))
    seen = []
    for turn in range(2):
        os.environ["MASTER_PORT"] = str(port + turn)
        with started(options) as whole:
            trainer = replace(whole, updates=PreparedUpdates(whole.optimizer, ReferenceKernels()))
            if turn == 0:
                for step in range(2):
                    train_step(trainer, batches(trainer, step), trainer.run.stages[0], 1e-2)
                store.save(2, trainer.chunks, trainer.optimizer, {"step": 2}, keep_last=None)
            else:
                path = store.newest()
                assert path is not None
                store.load(path, trainer.chunks, trainer.optimizer)
                for group in trainer.optimizer.param_groups:
                    group["step"] = 2  # where Transformer Engine's Adam counts; torch's counts in its state
            train_step(trainer, batches(trainer, 2), trainer.run.stages[0], 1e-2)
            parts = adam.parts(trainer.optimizer)
            states = [part.optimizer.state[p] for part in parts for p in part.get_parameters()]
            moments = [state[name].clone() for state in states for name in ("exp_avg", "exp_avg_sq")]
            seen.append([p.detach().clone() for part in parts for p in part.get_parameters()] + moments)
    return {"distance": _farthest(*seen), "tensors": len(seen[0]), "moved": float(seen[0][-1].abs().max())}
