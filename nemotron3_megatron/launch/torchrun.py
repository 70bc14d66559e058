"""The world that torchrun made, which training takes as it is."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence

from nemotron3_megatron.config import Origin, Recipe, planned_world
from nemotron3_megatron.config.errors import COMMAND_LINE, UserError


def world_made(
    recipe: Recipe, origins: Sequence[Origin], overrides: Sequence[str], environment: Mapping[str, str] = os.environ
) -> int:
    """Ranks of this start.

    Args:
        recipe: as composed.
        origins: where its values were set.
        overrides: what it was composed of.
        environment: of a process that torchrun started.

    Raises:
        UserError: torchrun did not start it, or made another world than the command line asks for.
    """
    if "WORLD_SIZE" not in environment:
        raise UserError(
            "train.py",
            why="was not started by torchrun, which numbers the processes of a run",
            nearest=f"torchrun --nproc-per-node={planned_world(recipe)} train.py {shlex.join(overrides)}",
        )
    made = int(environment["WORLD_SIZE"])
    asked = next((origin for origin in origins if origin.key == "world_size"), None)
    if asked and asked.place == COMMAND_LINE and recipe.world_size != made:
        raise UserError(
            f"world_size={recipe.world_size}",
            where=asked.place,
            why=f"{made} processes were started, and training takes the world from them",
            nearest=f"torchrun --nproc-per-node={recipe.world_size}",
        )
    return made
