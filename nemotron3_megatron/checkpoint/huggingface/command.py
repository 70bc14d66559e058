"""``nemotron3 export`` and ``nemotron3 import``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.config.words import key_values


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportOptions:
    """What ``nemotron3 export`` takes."""

    checkpoint: Path
    out: Path
    format: Literal["trained", "quantised"] = "trained"
    tokenizer: str | None = None
    """None: the one named in the run; "none": export without."""
    shard_gb: float = 4.0
    """Size of a file, and what the export needs in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportOptions:
    """What ``nemotron3 import`` takes, beside keys of the recipe."""

    hf: Path
    recipe: str
    out: Path


def export_main(overrides: Sequence[str]) -> int:
    """Export a checkpoint; prints where.

    Raises:
        UserError: an option or the checkpoint cannot be used.
    """
    values = _values(overrides)
    if isinstance(values.get("shard_gb"), str):
        values["shard_gb"] = _positive("shard_gb", str(values["shard_gb"]))
    options = typed(ExportOptions, values, "", _place)
    assert isinstance(options, ExportOptions)
    from nemotron3_megatron.checkpoint.huggingface.export import export_model

    export_model(
        options.checkpoint,
        options.out,
        tokenizer=options.tokenizer,
        number_format=options.format,
        shard_bytes=int(options.shard_gb * 1e9),
    )
    sys.stdout.write(f"{options.out}\n")
    return 0


def import_main(overrides: Sequence[str]) -> int:
    """Import a model; prints where the checkpoint is.

    Raises:
        UserError: an option, the recipe or the model cannot be used.
    """
    own = {item.name for item in fields(ImportOptions)}
    mine = [word for word in overrides if word.partition("=")[0] in own]
    options = typed(ImportOptions, _values(mine), "", _place)
    assert isinstance(options, ImportOptions)
    from nemotron3_megatron.checkpoint.huggingface.load import import_model

    recipe = [word for word in overrides if word not in mine]
    import_model(options.hf, options.recipe, options.out, overrides=recipe)
    sys.stdout.write(f"{options.out}\n")
    return 0


def _values(words: Sequence[str]) -> dict[str, Any]:
    return {**key_values(words, nearest="out={word}")}


def _positive(key: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not number > 0:
        raise UserError(f"{key}={text}", where="command line", why="is not a positive number", nearest=f"{key}=4")
    return number


def _place(_key: str) -> str:
    return "command line"
