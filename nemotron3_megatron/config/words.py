"""``key=value`` words of a verb that takes no recipe, as a typed dataclass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import yaml

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.provenance import COMMAND_LINE
from nemotron3_megatron.config.typed import typed


def options_of(kind: Any, words: Sequence[str]) -> Any:
    """Read ``key=value`` words into the dataclass ``kind``; values are YAML.

    Raises:
        UserError: a word has another form or is given twice, or a key or value is not legal.
    """
    values: dict[str, object] = {}
    for word in words:
        key, found, text = word.partition("=")
        if not found or key in values:
            why = "is not key=value" if not found else f"{key} is given twice"
            raise UserError(word, where=COMMAND_LINE, why=why)
        try:
            values[key] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise UserError(word, where=COMMAND_LINE, why="has a value that cannot be read") from None
    return typed(kind, values, "", lambda _: COMMAND_LINE)
