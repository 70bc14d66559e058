"""Isolated documents under context parallelism as one variable-length attention call.

A rank's part of the sequence is two slices. Documents cut a slice into segments of queries; a segment sees its document
from its beginning to the segment's own end, causally. So do kernels for sequences of different lengths, when the causal
diagonal of each sequence ends in its last query and last key ("bottom right"). Only the first segment of a slice has
keys before the slice: a slice's keys are one piece of the sequence, too.

Shapes: B batch, S local and G whole sequence, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from nemotron3_megatron.model.documents import document_starts

FEWEST_SEGMENTS = 16
"""That a call has room for."""

VariableLength = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int], Tensor]
"""(queries (T, N, D), keys (U, K, D), values (U, K, D), their cumulative lengths (n + 1,) int32 each, bounds of the
lengths) -> (T, N * D): causal attention of n sequences, the last query of each at its last key."""


@dataclass(frozen=True, slots=True)
class Segments:
    """What a rank's queries see, row by row and slice by slice."""

    keys: tuple[tuple[int, int, int], ...]
    """(row, first, end): the piece of the whole sequence whose keys a slice's queries need."""
    query_ends: Tensor
    """(n + 1,) int32 cumulative lengths of the segments, on the CPU; the last ones may be empty, so that n is a
    power of two and few shapes occur."""
    key_ends: Tensor
    """(n + 1,) int32 of what each segment sees."""


def segments(starts: Tensor, slices: tuple[tuple[int, int], ...]) -> Segments:
    """Cut a rank's slices at documents.

    Args:
        starts: (B, G) first position of each position's document, on the CPU.
        slices: [first, end) of the whole sequence, in the order the rank holds them.
    """
    keys, queries, seen = [], [], []
    for row, row_starts in enumerate(starts):
        for first, end in slices:
            mine = row_starts[first:end]
            low = int(mine[0])
            begins = [*mine.clamp(min=first).unique_consecutive().tolist(), end]
            lengths = [after - begin for begin, after in pairwise(begins)]
            keys.append((row, low, end))
            queries += lengths
            seen += [lengths[0] + first - low, *lengths[1:]]
    empty = [0] * (max(FEWEST_SEGMENTS, 1 << (len(queries) - 1).bit_length()) - len(queries))
    ends = (torch.tensor([0, *each, *empty]).cumsum(0).to(torch.int32) for each in (queries, seen))
    return Segments(tuple(keys), *ends)


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Tensor,
    slices: tuple[tuple[int, int], ...],
    attend: VariableLength,
) -> Tensor:
    """Causal attention inside documents, from a rank's queries to the keys of the whole sequence.

    The CPU waits for ``documents`` once.

    Args:
        query: (S, B, N, D).
        key, value: (G, B, K, D).
        documents: (B, G) index of each position's document.
        slices: as for :func:`segments`.
        attend: the kernel.

    Returns:
        (S, B, N * D).
    """
    length, batch = query.shape[:2]
    cut = segments(document_starts(documents).cpu(), slices)
    rows = query.transpose(0, 1).reshape(batch * length, *query.shape[2:])
    keys, values = (torch.cat([each[first:end, row] for row, first, end in cut.keys]) for each in (key, value))
    query_ends, key_ends = (each.to(query.device) for each in (cut.query_ends, cut.key_ends))
    widest = max(end - first for first, end in slices)
    out = attend(rows, keys, values, query_ends, key_ends, widest, key.shape[0])
    return out.reshape(batch, length, -1).transpose(0, 1).contiguous()
