"""Recipes: composed from YAML, typed, resolved once into a ``Run``."""

from nemotron3_megatron.config.compose import compose
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.parts import is_uniform, planned_world
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.resolve import check_data, make_run_dir, resolve
from nemotron3_megatron.config.run import Origin, Run

__all__ = [
    "Origin",
    "Recipe",
    "Run",
    "UserError",
    "check_data",
    "compose",
    "is_uniform",
    "make_run_dir",
    "planned_world",
    "resolve",
]
