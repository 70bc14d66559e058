"""Collectives that DDP runs beside captured passes are in every graph, whatever ran before its capture.

Ranks capture at different steps (a graph is made for each shape of the document boundaries): were the gathering of
parameters in one rank's graph and not in another's, they would wait for each other forever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from launch import run_ranks


def gathers() -> list[int]:
    """How many times parameters are gathered inside the passes of four steps, with validations between them."""
    import torch
    from layouts import batches, started
    from megatron.core.distributed import param_and_grad_buffer
    from torch import Tensor
    from uncaptured import Uncaptured

    from nemotron3_megatron.model.rooms import Rooms
    from nemotron3_megatron.train.step import evaluate, train_step

    started_gathers: list[None] = []
    gather = param_and_grad_buffer.dist_all_gather_func
    param_and_grad_buffer.dist_all_gather_func = lambda *args, **kw: (
        started_gathers.append(None),
        gather(*args, **kw),
    )[1]
    inside: list[int] = []

    class Watched(Uncaptured):
        def __call__(self, passes: Callable[[list[Tensor]], Tensor], inputs: Sequence[Tensor]) -> Tensor:
            before = len(started_gathers)
            sums = super().__call__(passes, inputs)
            inside.append(len(started_gathers) - before)
            return sums

    with started({"overlap": True}) as trainer:
        trainer = replace(trainer, captured=Watched(Rooms()))
        stage = trainer.run.stages[0]
        for step in range(4):
            if step % 2:
                evaluate(trainer, iter(batches(trainer, 77)), stage)
            train_step(trainer, batches(trainer, step), stage, 1e-3)
        torch.distributed.barrier()
    return inside


def test_each_call_gathers_parameters() -> None:
    for inside in run_ranks(gathers, 2):
        assert inside[0] > 0
        assert inside == [inside[0]] * 4
