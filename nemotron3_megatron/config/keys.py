"""Every key of a recipe with its type and default, for ``--help``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.typed import describe, is_required, show

_ENTRY = {dict: ".NAME", tuple: "[N]"}
"""How an entry of a collection is written behind its key."""


def key_lines(kind: Any = Recipe, prefix: str = "") -> Iterator[str]:
    """One line a key: ``parallel.tp = 1  (integer)``; keys without a default are marked as required.

    A mapping of keys has a line of its own only where it may be null or is one of a list.
    """
    hints = get_type_hints(kind)
    for item in fields(kind):
        hint, key = hints[item.name], prefix + item.name
        origin = get_origin(hint)
        inner = next((part for part in (hint, *get_args(hint)) if is_dataclass(part) and part is not Duration), None)
        if inner is None or origin not in (None, dict):
            yield _line(key, item, hint)
        if inner is not None:
            yield from key_lines(inner, f"{key}{_ENTRY.get(origin, '')}.")


def _line(key: str, item: Field[Any], hint: Any) -> str:
    if is_required(item):
        return f"{key}  ({describe(hint)}, required)"
    default = item.default if item.default is not MISSING else ()
    return f"{key} = {show(default)}  ({describe(hint)})"


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
