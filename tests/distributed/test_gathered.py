"""What is computed while tokens, outputs and their gradients travel between the ranks of ``allgather``."""

from __future__ import annotations

import os
from typing import Any

import pytest
from launch import run_ranks

from nemotron3_megatron.model import gathered


def order(latent: int | None) -> list[str]:
    """What one MoE layer does, in the order of one pass forward and backward: collectives and shared linears."""
    import torch
    from layouts import batches, started

    from nemotron3_megatron.train.step import train_step

    events: list[str] = []

    def logged(name: str) -> Any:
        return lambda *_: events.append(name)

    with (
        pytest.MonkeyPatch.context() as patch,
        started({"ep": 2, "dispatcher": "allgather", "latent": latent, "stack": "ME", "mtp_depths": 0}) as trainer,
    ):
        kinds = {gathered._gather: "gather", gathered._reduce_scatter: "sum"}
        begin, end = gathered.Exchange.begin, gathered.Exchange.end

        def name(exchange: Any) -> str:
            return kinds[exchange._there]

        def log_begin(self: Any, x: torch.Tensor, *, backward: bool = False) -> torch.Tensor:
            self.log = f"{name(self)} {'backward' if backward else 'forward'}"
            events.append(f"begin {self.log}")
            return begin(self, x, backward=backward)

        def log_end(self: Any) -> torch.Tensor:
            events.append(f"end {self.log}")
            return end(self)

        patch.setattr(gathered.Exchange, "begin", log_begin)
        patch.setattr(gathered.Exchange, "end", log_end)
        layers = [m for m in trainer.chunks[0].modules() if isinstance(m, gathered.GatheringExperts)]
        shared: Any = layers[0].shared_experts  # type: ignore[attr-defined]
        for each in ("linear_fc1", "linear_fc2"):
            getattr(shared, each).register_forward_hook(logged(f"{each} forward"))
            getattr(shared, each).register_full_backward_hook(logged(f"{each} backward"))
        micro = batches(trainer, 0)[:1]
        train_step(trainer, micro, trainer.run.stages[0], 1e-3)
    first = events.index("linear_fc1 forward")
    last = events.index("linear_fc1 backward")
    return [*events[first - 1 : first + 5], *events[last - 4 : last + 2]]


@pytest.mark.parametrize("latent", [None, 8])
def test_shared_linears_run_beside_each_collective(latent: int | None) -> None:
    travelling = [
        ["begin gather forward", "linear_fc1 forward", "end gather forward"],
        ["begin sum forward", "linear_fc2 forward", "end sum forward"],
        ["begin sum backward", "linear_fc2 backward", "end sum backward"],
        ["begin gather backward", "linear_fc1 backward", "end gather backward"],
    ]
    for found in run_ranks(order, 2, latent=latent):
        assert found == [event for events in travelling for event in events]


def without_room() -> tuple[list[float], list[float], int]:
    """Losses of two steps with the number of rows known, and with room for none of them; expert layers tried twice."""
    from layouts import batches, started

    from nemotron3_megatron.model.row_forecast import RowForecast
    from nemotron3_megatron.train.step import train_step

    world = {"ep": 2, "dispatcher": "allgather", "stack": "ME", "mtp_depths": 0}
    losses: list[list[float]] = []
    again = 0
    had_room = gathered.GatherDispatcher.had_room

    def counted(self: Any) -> bool:
        nonlocal again
        fits = had_room(self)
        again += not fits
        return fits

    for port, forced in enumerate((False, True), start=int(os.environ["MASTER_PORT"])):
        os.environ["MASTER_PORT"] = str(port)
        with pytest.MonkeyPatch.context() as patch, started(world) as trainer:
            patch.setattr(gathered.GatheringExperts, "leaves_spare_rows_alone", lambda _, forced=forced: forced)
            patch.setattr(RowForecast, "room", lambda *_, **__: 0)
            patch.setattr(gathered.GatherDispatcher, "had_room", counted)
            results = [train_step(trainer, batches(trainer, i), trainer.run.stages[0], 1e-3) for i in range(2)]
            losses.append([value for result in results for value in (*result.losses, result.update.grad_norm)])
    return losses[0], losses[1], again


def test_experts_without_room_for_their_rows_are_launched_again() -> None:
    for waiting, again, times in run_ranks(without_room, 2):
        assert again == waiting
        assert times > 0
