"""A recipe's name and a command line in, a typed recipe and the origins of its values out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.provenance import check_single_writers, origins
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.run import Origin
from nemotron3_megatron.config.typed import typed

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


def compose(overrides: Sequence[str], recipes: Path = RECIPES) -> tuple[Recipe, tuple[Origin, ...]]:
    """Compose a recipe from the tree of YAML files and ``key=value`` overrides.

    Args:
        overrides: such as ``["recipe=tiny", "optimizer.lr=1e-3"]``, in Hydra's grammar.
        recipes: directory of the tree.

    Returns:
        The recipe, and an origin for each value that a file or the command line sets.

    Raises:
        UserError: anything wrong with what was written, with its place.
    """
    from nemotron3_megatron.config.tree import load  # Hydra: only where recipes are composed

    if not (recipes / "config.yaml").is_file():
        raise UserError(str(recipes), why="holds no recipes (config.yaml is missing)")
    composed = load(overrides, recipes)
    writers = check_single_writers(composed.writes)

    def place(key: str) -> str | None:
        inside = (write for name, write in writers.items() if name.startswith(f"{key}."))
        write = writers.get(key) or next(inside, None)
        return write.place if write else None

    recipe = typed(Recipe, {"name": composed.recipe_name, **composed.data}, "", place)
    assert isinstance(recipe, Recipe)
    return recipe, origins(recipe, writers)
