"""Document boundaries inside a packed sequence."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def document_runs(seq_idx: Tensor) -> Tensor:
    """Number the documents of packed sequences.

    Args:
        seq_idx: (b, s) integers, constant inside a document, different in neighbouring ones.

    Returns:
        (b, s) int64, from 0, one more at every change of value. Two positions are in one document exactly where it
        is equal, even if ``seq_idx`` uses a value again for a later document.
    """
    changes = (seq_idx[:, 1:] != seq_idx[:, :-1]).long()
    return F.pad(changes, (1, 0)).cumsum(1)


def document_starts(seq_idx: Tensor) -> Tensor:
    """First position of each position's document.

    Args:
        seq_idx: as for :func:`document_runs`.

    Returns:
        (b, s) int64, never decreasing along a row.
    """
    positions = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    changes = F.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
    return (positions * changes).cummax(1).values
