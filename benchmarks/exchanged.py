"""Bytes that leave a rank by a group's collectives, which is what ``nemotron3 plan`` counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

OPERATIONS = {
    "all_to_all_single": "all-to-all",
    "all_gather_into_tensor": "all-gather",
    "reduce_scatter_tensor": "reduce-scatter",
}
"""All that experts' tokens and gates travel by (Megatron-Core's dispatchers and ``model/gathered.py``), as
``plan/communication.py`` calls them."""


@contextmanager
def exchanged(group: ProcessGroup) -> Iterator[Counter[str]]:
    """Count what this rank sends to others of ``group``, by operation, until the end of the block.

    A replayed CUDA graph calls nothing, and is not counted.
    """
    seen: Counter[str] = Counter()
    originals = {name: getattr(torch.distributed, name) for name in OPERATIONS}
    for name, original in originals.items():
        setattr(torch.distributed, name, _counted(original, OPERATIONS[name], group, seen))
    try:
        yield seen
    finally:
        for name, original in originals.items():
            setattr(torch.distributed, name, original)


def _counted(original: Callable[..., Any], operation: str, wanted: ProcessGroup, seen: Counter[str]) -> Any:
    @wraps(original)
    def call(output: Tensor, given: Tensor, *args: Any, **options: Any) -> Any:
        if options.get("group") is wanted:
            seen[operation] += _sent(output, given, options.get("input_split_sizes"), wanted)
        return original(output, given, *args, **options)

    return call


def _sent(output: Tensor, given: Tensor, splits: list[int] | None, group: ProcessGroup) -> int:
    """All but the own part of the larger buffer; ``splits``: rows for each rank, equally many if None."""
    if splits is None:
        return max(output.nbytes, given.nbytes) * (group.size() - 1) // group.size()
    rows = sum(splits)
    return int((rows - splits[group.rank()]) * given.nbytes // rows) if rows else 0
