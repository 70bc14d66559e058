"""Document boundaries inside a packed sequence."""

from __future__ import annotations

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
