"""What the ranks do in the CUDA graph test: the same steps with and without a graph."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from layouts import batches, started

from nemotron3_megatron.model.row_forecast import RowForecast
from nemotron3_megatron.train.callbacks.base import StepEvent
from nemotron3_megatron.train.callbacks.health import HealthTelemetry
from nemotron3_megatron.train.graph import CapturedPasses
from nemotron3_megatron.train.step import Trainer, evaluate, train_step

STEPS = 6
GPU = {"device": "cuda", "spec": "te", "dtype": "bf16"}
MODES = {"eager": "none", "again": "none", "graph": "passes"}


def compare(options: dict[str, Any], room: int | None = None) -> dict[str, Any]:
    """For each mode: losses and gradient norms of some steps, with a validation pass in between and every second
    step's health measured; and by how much its last gradients differ from the first mode's.

    ``room``: what is foretold for the rows of every expert layer.
    """
    again: list[None] = []
    if room is not None:
        RowForecast.room = lambda *_, **__: room  # type: ignore[method-assign]
        make_room = CapturedPasses.make_room
        CapturedPasses.make_room = lambda self: (again.append(None), make_room(self))[1]  # type: ignore[method-assign]
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    reference: dict[str, torch.Tensor] = {}
    for offset, (mode, cuda_graph) in enumerate(MODES.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started({**GPU, "cuda_graph": cuda_graph, **options}) as trainer:
            results[mode] = _train(trainer)
            results[mode]["again"] = len(again)
            results[mode]["captures"] = len(trainer.captured._captures) if trainer.captured else 0
            found = _gradients(trainer)
            reference = reference or found
            distances = [
                float((found[name] - value).norm() / value.norm()) for name, value in reference.items() if value.any()
            ]
            results[mode]["gradients"] = float(torch.tensor(distances).median())
    return results


def _train(trainer: Trainer) -> dict[str, Any]:
    health = HealthTelemetry(lambda step: step % 2 == 0, trainer)
    losses, seen = [], []
    for step in range(1, STEPS + 1):
        health.before_step(step)
        result = train_step(trainer, batches(trainer, step), trainer.run.stages[0], 1e-3)
        event = StepEvent(
            step=step, tokens=0, stage=trainer.run.stages[0], lr=1e-3, result=result, step_time_s=1.0, last=False
        )
        health.step_done(event)
        seen.append(health.health())
        losses.append([*result.losses, result.update.grad_norm])
        if step == STEPS // 2:
            losses.append([*evaluate(trainer, iter(batches(trainer, 77)), trainer.run.stages[0]).depths, 0.0])
    return {"losses": losses, "health": seen}


def _gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {
        name: parameter.main_grad.float().clone()  # type: ignore[attr-defined]
        for chunk in trainer.chunks
        for name, parameter in chunk.named_parameters()
    }
