"""The rule of ``device=cpu``: what is asked for by name and runs on GPUs only."""

from __future__ import annotations

from collections.abc import Iterator

from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import Violation


def device(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Nothing that a CPU cannot do, wherever the recipe is planned; ``device=auto`` is found out at the start."""
    if recipe.device != "cpu":
        return
    asked = {
        "model.spec": (recipe.model.spec, "te", "torch", "Transformer Engine and mamba-ssm run on CUDA only"),
        "parallel.cuda_graph": (recipe.parallel.cuda_graph, "passes", "auto", "a CPU captures no CUDA graph"),
        "resilience.straggler": (recipe.resilience.straggler, "nvrx", "own", "nvrx times CUDA kernels"),
    }
    for key, (value, needs_gpu, instead, why) in asked.items():
        if value == needs_gpu:
            yield Violation((key, "device"), f"{why}, and device=cpu", f"{key}={instead} or device=cuda")
