"""What the rank does in the CUDA graph test: the same steps with and without a graph."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from layouts import batches, started
from tiny import tiny_run

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.train.step import evaluate, train_step

STEPS = 6


def graphed_run(world_size: int, *, cuda_graph: str, **options: Any) -> Run:
    run = tiny_run(world_size, device="cuda", spec="te", dtype="bf16", **options)
    return replace(run, parallel=replace(run.parallel, cuda_graph=cuda_graph))


def losses(isolate_documents: bool) -> dict[str, Any]:
    """For each mode: losses and gradient norms of some steps, a validation pass in between, and whether a graph ran."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for offset, mode in enumerate(("none", "passes")):
        os.environ["MASTER_PORT"] = str(port + offset)
        options = {"cuda_graph": mode, "isolate_documents": isolate_documents}
        with started(options, graphed_run) as trainer:
            found = []
            for step in range(STEPS):
                result = train_step(trainer, batches(trainer, step), trainer.run.stages[0], 1e-3)
                found.append([*result.losses, result.update.grad_norm])
                if step == 3:
                    found.append([*evaluate(trainer, iter(batches(trainer, 77)), trainer.run.stages[0]).depths, 0.0])
            results[mode] = found
            results[f"{mode} captures"] = len(trainer.captured._captures) if trainer.captured else 0
    return results
