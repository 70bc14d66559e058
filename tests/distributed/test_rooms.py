"""A captured step in which a rank's experts got more rows than room moves nothing and is computed again, everywhere."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from launch import run_ranks

ROWS = 10_000


def steps(crowded_rank: int | None) -> dict[str, Any]:
    """Losses, norms, health, expert biases of three steps; on ``crowded_rank`` the second one lacks room at first."""
    import torch
    from layouts import batches, started
    from torch import Tensor
    from uncaptured import Uncaptured

    from nemotron3_megatron.model.rooms import rooms_of
    from nemotron3_megatron.train.callbacks.base import StepEvent
    from nemotron3_megatron.train.callbacks.health import HealthTelemetry
    from nemotron3_megatron.train.step import train_step

    rank = int(os.environ["RANK"])

    class Crowded(Uncaptured):
        """What a graph would have noted is noted by hand."""

        calls = 0

        def __call__(self, passes: Callable[[list[Tensor]], Tensor], inputs: Sequence[Tensor]) -> Tensor:
            self.calls += 1
            for dispatcher in self.rooms.dispatchers:
                dispatcher.crowd = torch.zeros(2, dtype=torch.int64)
            lacks = self.calls == 2 and crowded_rank is not None
            # Experts without room take nothing: the passes go wrong, here by other inputs.
            given = [torch.zeros_like(each) if lacks and each.dtype == torch.int64 else each for each in inputs]
            sums = super().__call__(passes, given)
            if lacks and rank == crowded_rank:
                self.rooms.dispatchers[0].crowd = torch.tensor([1, ROWS])
            return sums

    with started({"ep": 2, "dispatcher": "allgather"}) as trainer:
        captured = Crowded(rooms_of(trainer.chunks))
        trainer = replace(trainer, captured=captured)
        health, stage = HealthTelemetry(lambda _: True, trainer), trainer.run.stages[0]
        results, measured = [], []
        for i in range(3):
            health.before_step(i)
            results.append(result := train_step(trainer, batches(trainer, i), stage, 1e-3))
            event = StepEvent(step=i, tokens=0, stage=stage, lr=1e-3, result=result, step_time_s=1.0, last=False)
            health.step_done(event)
            measured.append(health.health())
        biases = [b.tolist() for c in trainer.chunks for n, b in c.named_buffers() if n.endswith("expert_bias")]
        rooms = [each.forecast.room(256, captured=True) for each in captured.rooms.dispatchers]
    seen = [(result.losses, result.update.grad_norm, result.update.applied) for result in results]
    return {"seen": seen, "health": measured, "biases": biases, "calls": captured.calls, "rooms": rooms}


def test_all_ranks_compute_the_step_again() -> None:
    undisturbed = run_ranks(steps, 2, crowded_rank=None)
    for expected, found in zip(undisturbed, run_ranks(steps, 2, crowded_rank=1), strict=True):
        assert expected["calls"] == 3
        assert found["calls"] == 4
        assert found["seen"] == expected["seen"]
        assert found["health"] == expected["health"]
        assert found["biases"] == expected["biases"]
        assert all(more > before for more, before in zip(found["rooms"], expected["rooms"], strict=True))
