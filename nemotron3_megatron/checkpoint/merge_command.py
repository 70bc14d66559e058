"""``nemotron3 merge``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.config.words import key_values


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What ``nemotron3 merge`` takes."""

    run_dir: Path
    out: Path
    window: Duration | None = None
    """In tokens, back from the newest checkpoint; None: all checkpoints."""
    decay: Literal["minus_sqrt", "linear", "mean"] = "minus_sqrt"
    order: Literal["sequential", "reversed", "random"] = "sequential"
    seed: int = 0


def merge_main(words: Sequence[str]) -> int:
    """Merge, and say what went in with which weight.

    Raises:
        UserError: an option or a checkpoint cannot be used.
    """
    options = typed(MergeOptions, _values(words), "", lambda _: "command line")
    assert isinstance(options, MergeOptions)
    if options.window is not None and options.window.unit != "tokens":
        raise UserError(
            f"window={options.window}", where="command line", why="is not in tokens", nearest="window='500B tokens'"
        )
    from nemotron3_megatron.checkpoint.merging import merge

    merged = merge(
        options.run_dir,
        options.out,
        window_tokens=None if options.window is None else options.window.in_tokens(1),
        decay=options.decay,
        order=options.order,
        seed=options.seed,
    )
    for source, weight in zip(merged.sources, merged.weights, strict=True):
        sys.stdout.write(f"{weight:8.5f}  {source}\n")
    sys.stdout.write(f"{merged.path}\n")
    return 0


def _values(words: Sequence[str]) -> dict[str, Any]:
    usage = "nemotron3 merge run_dir=RUN out=DIR"
    values = key_values(words, nearest=usage, nearest_twice=usage)
    return {key: int(value) if key == "seed" and value.isdecimal() else value for key, value in values.items()}
