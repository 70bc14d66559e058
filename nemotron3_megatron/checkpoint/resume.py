"""Where a start will continue, found out before there are process groups: its layout may depend on it.

Reads only, and needs neither torch nor another rank: no rank changes the directory before all have come this far.
"""

from __future__ import annotations

import re
from pathlib import Path

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import Recipe

_NAME = re.compile(r"step_(\d{8,})|\.step_(\d{8,})\.retired")
"""A checkpoint; one whose replacement was cut short between its two renames."""


def step_to_resume(recipe: Recipe) -> int:
    """Optimizer steps done in the newest complete checkpoint of the run, else in ``checkpoint.load``, else 0.

    Raises:
        UserError: the recipe names a stage, which only planning heeds.
    """
    if recipe.stage is not None:
        raise UserError(f"stage={recipe.stage}", why="is for planning: training takes the stage from the checkpoint")
    found = {}
    for path in (Path(recipe.run_dir or f"runs/{recipe.name}") / "checkpoints").glob("*step_*"):
        if match := _NAME.fullmatch(path.name):
            found[int(match[1] or match[2]), path.name.startswith("step_")] = path
    loaded = [Path(recipe.checkpoint.load)] if recipe.checkpoint.load else []
    for path in [*(found[key] for key in sorted(found, reverse=True)), *loaded]:
        try:
            return manifest.verify(path).step
        except ValueError:
            continue  # damaged: the start itself says so and passes it over too
    return 0
