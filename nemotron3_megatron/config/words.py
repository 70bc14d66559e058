"""``key=value`` words of a verb that takes no recipe: split, or as a typed dataclass."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import yaml

from nemotron3_megatron.config.errors import COMMAND_LINE, UserError
from nemotron3_megatron.config.typed import typed


def key_values(words: Sequence[str], *, nearest: str = "", nearest_twice: str = "") -> dict[str, str]:
    """Split ``key=value`` words.

    Args:
        words: of the command line.
        nearest: shown for a word without ``=``, which takes the place of ``{word}``.
        nearest_twice: shown for a key given twice.

    Raises:
        UserError: a word has another form or is given twice.
    """
    values: dict[str, str] = {}
    for word in words:
        key, found, text = word.partition("=")
        if not found:
            raise UserError(word, where=COMMAND_LINE, why="is not key=value", nearest=nearest.replace("{word}", word))
        if key in values:
            raise UserError(word, where=COMMAND_LINE, why=f"{key} is given twice", nearest=nearest_twice)
        values[key] = text
    return values


_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")


def options_of(kind: Any, words: Sequence[str]) -> Any:
    """Read ``key=value`` words into the dataclass ``kind``; values are YAML.

    Raises:
        UserError: a word has another form or is given twice, or a key or value is not legal.
    """
    values: dict[str, object] = {}
    for key, text in key_values(words).items():
        try:
            value = yaml.safe_load(text)
            # PyYAML takes 1e-5 for text: YAML 1.1 wants a point in it.
            values[key] = float(text) if value == text and _EXPONENT.fullmatch(text) else value
        except yaml.YAMLError:
            why = "has a value that cannot be read"
            raise UserError(f"{key}={text}", where=COMMAND_LINE, why=why) from None
    return typed(kind, values, "", lambda _: COMMAND_LINE)
