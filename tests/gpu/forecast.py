"""What the ranks do in the test of spare rows: one batch's gradients with the exact number, more, and too few."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from layouts import batches, started

from nemotron3_megatron.model.gathered import GatheringMoELayer
from nemotron3_megatron.model.row_forecast import RowForecast
from nemotron3_megatron.train.step import train_step

WORLD = {"device": "cuda", "spec": "te", "dtype": "bf16", "ep": 2, "dispatcher": "allgather", "overlap": True}


def measure_rooms(recompute: str) -> dict[str, Any]:
    """Losses, expert layers' calls, and which gradients differ from those with the exact number of rows."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    reference: dict[str, torch.Tensor] = {}
    rooms: dict[str, Callable[[int], int]] = {"waiting": int, "foreseen": lambda tokens: 8 * tokens, "too small": _none}
    for offset, (room, rows) in enumerate(rooms.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with pytest.MonkeyPatch.context() as patch, started({**WORLD, "recompute": recompute}) as trainer:
            if room == "waiting":
                patch.setattr(GatheringMoELayer, "leaves_spare_rows_alone", lambda _: False)
            patch.setattr(RowForecast, "room", staticmethod(lambda tokens, captured, rows=rows: rows(tokens)))
            calls = _counted(patch)
            torch.full((2**28,), torch.nan, device="cuda")  # freed at once: what nobody writes is not a number
            losses = train_step(trainer, batches(trainer, 0), trainer.run.stages[0], 1e-3).losses
            found = {name: weight.main_grad.clone() for name, weight in trainer.chunks[0].named_parameters()}
            reference = reference or found
            differ = [name for name, gradient in found.items() if not torch.equal(gradient, reference[name])]
            results[room] = {"losses": list(losses), "differ": differ, "calls": len(calls)}
    return results


def _none(tokens: int) -> int:
    return 1


def _counted(patch: pytest.MonkeyPatch) -> list[None]:
    compute, calls = GatheringMoELayer.routed_experts_compute, []

    def counted(self: Any, *args: Any) -> Any:
        calls.append(None)
        return compute(self, *args)

    patch.setattr(GatheringMoELayer, "routed_experts_compute", counted)
    return calls
