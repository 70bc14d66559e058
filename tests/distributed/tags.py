"""What ranks do in the test of losses by tag: a training step and a validation pass of one world."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from layouts import batches, started
from tiny import MICRO_BATCH, tiny_run

from nemotron3_megatron.config.recipe import SourceConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.train.step import Trainer, evaluate, train_step

TAGS = ("web", "code", "math", "silent")
OF_SEQUENCES = ("web", "code", "math", "web", "code", "code", "web", "silent")
"""Of the eight sequences of the global batch; no token of the last one carries loss."""


def tagged_run(world_size: int, **options: Any) -> Run:
    """The tiny run with a source for each tag; their files are never read."""
    run = tiny_run(world_size, **options)
    sources = {f"source_{tag}": SourceConfig(path="unused", tag=tag) for tag in TAGS}
    return replace(run, data=replace(run.data, sources=sources))


def measure(worlds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Of each layout: losses and tags of a validation pass, then those of a training step on the same batch."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for offset, (name, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options, tagged_run) as trainer:
            stage = trainer.run.stages[0]
            held_out = evaluate(trainer, iter(_tagged(trainer)), stage)
            step = train_step(trainer, _tagged(trainer), stage, 1e-3)
            results[name] = {
                "validation": {"losses": held_out.depths, "tags": held_out.tags},
                "training": {"losses": step.losses, "tags": step.tags},
            }
    return results


def measure_alone() -> dict[str, Any]:
    """The layout of one rank, and what it must give."""
    return {**measure({"one": {}}), "alone": _alone()}


def _alone() -> dict[str, float]:
    """On one rank, without tags: the mean main loss where only the sequences of one tag carry loss, by tag."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    found = {}
    with started({}) as trainer:
        for tag in TAGS[:-1]:
            only = [replace(batch, loss_mask=batch.loss_mask * mine) for batch, mine in _with(trainer, of=(tag,))]
            found[tag] = evaluate(trainer, iter(only), trainer.run.stages[0]).depths[0]
    return found


def _tagged(trainer: Trainer) -> list[MicroBatch]:
    return [replace(batch, tags=tags) for batch, tags in _with(trainer, of=TAGS)]


def _with(trainer: Trainer, of: tuple[str, ...]) -> list[tuple[MicroBatch, torch.Tensor]]:
    """This rank's micro-batches, each with (b, tags) bool: which of ``of`` its sequences have."""
    tags = torch.tensor([[tag == own for tag in of] for own in OF_SEQUENCES]).split(MICRO_BATCH)
    mine, rank = batches(trainer, 0), trainer.groups.dp.rank()
    return list(zip(mine, tags[rank * len(mine) : (rank + 1) * len(mine)], strict=True))
