"""Every key of a recipe with its type and default, for ``--help``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.typed import describe, is_required, show


def key_lines(kind: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """One line a key: ``parallel.tp = 1  (integer)``; keys without a default are marked as required."""
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint, key = hints[item.name], prefix + item.name
        inner = get_args(hint)[1] if get_origin(hint) is dict else hint
        if is_dataclass(inner) and inner is not Duration:
            yield from key_lines(inner, f"{key}.NAME." if inner is not hint else f"{key}.")
        elif is_required(item):
            yield f"{key}  ({describe(hint)}, required)"
        else:
            default = item.default if item.default is not MISSING else ()
            yield f"{key} = {show(default)}  ({describe(hint)})"


def group_lines(recipes: Path) -> Iterator[str]:
    """One line a group of the tree: ``precision=bf16|fp32``."""
    for directory in sorted(path for path in recipes.iterdir() if path.is_dir()):
        names = sorted(path.stem for path in directory.glob("*.yaml"))
        if names:
            yield f"{directory.name}={'|'.join(names)}"


def help_text(recipes: Path) -> str:
    """Groups and keys, as ``train.py --help`` shows them."""
    groups = "\n  ".join(group_lines(recipes))
    keys = "\n  ".join(key_lines())
    return f"groups (one choice each):\n  {groups}\n\nkeys (with defaults):\n  {keys}\n"
