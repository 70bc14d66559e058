"""A block of columns that goes through cached layers, and what its positions may see.

A column is one position of every row of the batch. Rows of unequal length are padded in front; columns that do not
exist in a row (padding, or drafts that were refused) are never seen by others, so that only their order matters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """What layers need to know of the columns they are given. B rows, S columns, T = start + S columns in all."""

    start: int
    """Columns in the cache before this block."""
    columns: int
    valid: Tensor | None
    """(B, S) bool, False where a row has no such column; None: all exist."""
    allowed: Tensor | None
    """(B or 1, 1, S, T) bool: which columns of cache and block each new one sees. None: all up to itself, which needs
    an empty cache or a block of one column."""
    revocable: bool
    """Some of its columns may be taken back."""


def block_of(
    seen: Tensor | None, start: int, columns: int, valid: Tensor | None, *, revocable: bool, device: torch.device
) -> Block:
    """Describe a new block.

    Args:
        seen: (B, start) bool, columns of the cache that exist; None: all.
        start: columns in the cache.
        columns: of the block.
        valid: (B, columns) bool, see :class:`Block`.
        revocable: see :class:`Block`.
        device: of the model.
    """
    allowed = None
    if seen is not None or valid is not None or (start and columns > 1):
        inside = torch.ones(columns, columns, dtype=torch.bool, device=device).tril()[None]
        if valid is not None:
            # A column that does not exist sees itself: attention over nothing would be NaN.
            inside = inside & (valid[:, None, :] | torch.eye(columns, dtype=torch.bool, device=device))
        before = inside.new_ones(1, start) if seen is None else seen
        rows = max(before.shape[0], inside.shape[0])
        past = before[:, None, :].expand(rows, columns, start)
        allowed = torch.cat([past, inside.expand(rows, -1, -1)], dim=2)[:, None]
    return Block(start=start, columns=columns, valid=valid, allowed=allowed, revocable=revocable)
