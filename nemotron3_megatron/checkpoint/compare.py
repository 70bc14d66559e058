"""Does a checkpoint fit a model? Answered from its index, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from nemotron3_megatron.checkpoint import adam
from nemotron3_megatron.checkpoint.collective import on_every_rank

Shapes = Mapping[str, tuple[int, ...]]

_MAX_ROWS = 20


def stored_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor in a checkpoint, by key."""
    index = dist_checkpointing.load_tensors_metadata(str(path))
    return {key: tuple(tensor.global_shape) for key, tensor in index.items()}


def wanted_shapes(content: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Global shape of every tensor that the ranks together would load, by key. A collective."""
    copy, _ = extract_matching_values(content, lambda _: True)
    apply_factories(copy)
    mine = {item.key: tuple(item.global_shape) for item in nested_values(copy) if isinstance(item, ShardedTensor)}
    return {key: shape for rank in on_every_rank(lambda: mine) for key, shape in rank.items()}


def has_other_dtypes(path: Path, content: dict[str, Any]) -> bool:
    """Whether any rank would load a tensor that is stored in another dtype. A collective."""
    index = dist_checkpointing.load_tensors_metadata(str(path))
    copy, _ = extract_matching_values(content, lambda _: True)
    apply_factories(copy)
    mine = [item.dtype != index[item.key].dtype for item in nested_values(copy) if isinstance(item, ShardedTensor)]
    return any(on_every_rank(lambda: any(mine)))


def differences(stored: Shapes, wanted: Shapes) -> list[tuple[str, str, str]]:
    """Rows (tensor, shape in the checkpoint, shape in the model) for all that does not match.

    Weights and buffers only, as long as any of them differ: optimizer state then differs for the same reason.
    """
    keys = sorted(key for key in stored.keys() | wanted.keys() if stored.get(key) != wanted.get(key))
    keys = [key for key in keys if not key.startswith(adam.PREFIX)] or keys
    return [(key, _shown(stored.get(key)), _shown(wanted.get(key))) for key in keys]


def table(rows: list[tuple[str, str, str]]) -> str:
    """The first rows of :func:`differences` as text."""
    first = rows[:_MAX_ROWS]
    lines = [("tensor", "checkpoint", "model"), *first]
    widths = [max(len(line[column]) for line in lines) for column in range(3)]
    text = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    ]
    if len(rows) > len(first):
        text.append(f"  ... and {len(rows) - len(first)} more")
    return "\n".join(text)


def _shown(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else " x ".join(map(str, shape)) or "scalar"
