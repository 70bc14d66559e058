"""A recipe's name and a command line in, a typed recipe and the origins of its values out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.provenance import check_single_writers, origins, place_of
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.run import Origin
from nemotron3_megatron.config.typed import Place, typed

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
    from nemotron3_megatron.precision.parse import check_policy, normalised  # they import this package

    if not (recipes / "config.yaml").is_file():
        raise UserError(str(recipes), why="holds no recipes (config.yaml is missing)")
    composed = load(overrides, recipes)
    writers = check_single_writers(composed.writes)

    def place(key: str) -> str | None:
        return place_of(key, writers)

    data = {"name": composed.recipe_name, **composed.data}
    if "precision" in data:
        data["precision"] = normalised(data["precision"], "precision", place)
    if isinstance(stages := data.get("stages"), dict):
        data["stages"] = {name: _with_policy(stage, f"stages.{name}", place) for name, stage in stages.items()}
    recipe = typed(Recipe, data, "", place)
    assert isinstance(recipe, Recipe)
    check_policy(recipe.precision, "precision", place)
    for name, stage in recipe.stages.items():
        if stage.precision is not None:
            check_policy(stage.precision, f"stages.{name}.precision", place)
    return recipe, origins(recipe, writers)


def _with_policy(stage: object, key: str, place: Place) -> object:
    """A stage's data; a precision policy of its own in the form that ``typed`` reads."""
    from nemotron3_megatron.precision.parse import normalised

    if not isinstance(stage, dict) or stage.get("precision") is None:
        return stage
    return {**stage, "precision": normalised(stage["precision"], f"{key}.precision", place)}
