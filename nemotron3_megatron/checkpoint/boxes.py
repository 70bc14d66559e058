"""Part of a parameter, flat in memory, as boxes of the whole tensor: what a data-parallel shard is to a checkpoint.

The distributed optimizer cuts parameters wherever a rank's share of the gradient buffer ends, so a shard begins and
ends in the middle of a row. In the whole tensor such a range is a few boxes, each contiguous in memory: a checkpoint
can store them, and read them back into place, without any rank ever holding more than its shard.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a local parameter that has a checkpoint key of its own; most parameters are one piece."""

    key: str
    start: int
    """First element, counted in the parameter's memory order."""
    shape: Shape
    global_shape: Shape
    """With the prepended axes (the expert's number)."""
    global_offset: Shape
    replica_id: tuple[int, ...]
    """(pipeline, tensor, data-parallel) replica; the first of all writes."""


def pieces(entry: ShardedTensor | ShardedTensorFactory) -> list[Piece]:
    """The pieces of a parameter, in memory order; a factory's (Mamba's joint input projection) are several.

    Raises:
        TypeError: a factory that does not cut the parameter into contiguous parts.
    """
    whole = torch.empty(entry.data.shape, device="meta")
    if isinstance(entry, ShardedTensorFactory):
        parts = entry.build_fn(entry.key, whole, entry.replica_id, None)
    else:
        parts = [entry]
    found, start = [], 0
    for part in parts:
        if parts[0] is not entry and (part.data.storage_offset() != start or not part.data.is_contiguous()):
            raise TypeError(f"the parts of {entry.key} do not follow one another in memory")
        shape = tuple(part.local_shape)
        found.append(
            Piece(part.key, start, shape, tuple(part.global_shape), tuple(part.global_offset), tuple(part.replica_id))
        )
        start += prod(shape)
    if start != whole.numel():
        raise TypeError(f"the parts of {entry.key} hold {start} of its {whole.numel()} elements")
    return found


def boxes(shape: Shape, begin: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """(offset, size) of boxes that cover elements ``begin`` to ``end - 1`` of a tensor, in row-major order.

    Each box is contiguous in memory. There are at most ``2 * len(shape) - 1``, and as few as possible.
    """
    if begin >= end:
        return
    if (begin, end) == (0, prod(shape)):
        yield (0,) * len(shape), shape
        return
    row = prod(shape[1:])
    if len(shape) == 1:
        yield (begin,), (end - begin,)
        return
    first, last = -(-begin // row), end // row  # whole rows
    if first > last:  # inside one row
        yield from _in_row(shape, last, begin, end)
        return
    yield from _in_row(shape, first - 1, begin, first * row)
    if first < last:
        yield (first, *[0] * (len(shape) - 1)), (last - first, *shape[1:])
    yield from _in_row(shape, last, last * row, end)


def sharded(pieces_of: list[Piece], prefix: str, start: int, flat: torch.Tensor, *, alone: bool) -> list[ShardedTensor]:
    """Elements ``start`` onwards of a parameter as ``ShardedTensor``s whose data are views of ``flat``.

    Args:
        pieces_of: the parameter (:func:`pieces`).
        prefix: of the checkpoint keys.
        start: place of ``flat``'s first element in the parameter's memory order.
        flat: 1-D and contiguous, of any dtype.
        alone: no other data-parallel rank holds these elements; False: all hold them, and share the writing.
    """
    found = []
    for piece in pieces_of:
        begin = max(start - piece.start, 0)
        end = min(start + flat.numel() - piece.start, prod(piece.shape))
        prepended = len(piece.global_shape) - len(piece.shape)
        place = piece.start + begin - start
        for offset, size in boxes(piece.shape, begin, end):
            shape = (*[1] * prepended, *size)
            corner = tuple(a + b for a, b in zip(piece.global_offset, (*[0] * prepended, *offset), strict=True))
            found.append(
                ShardedTensor(
                    key=f"{prefix}.{piece.key}",
                    data=flat[place : place + prod(size)].view(shape),
                    dtype=flat.dtype,
                    local_shape=shape,
                    global_shape=piece.global_shape,
                    global_offset=corner,
                    axis_fragmentations=None,  # no regular grid
                    replica_id=(*piece.replica_id[:-1], 0) if alone else piece.replica_id,
                )
            )
            place += prod(size)
    return found


def _in_row(shape: Shape, row: int, begin: int, end: int) -> Iterator[tuple[Shape, Shape]]:
    """Boxes within one row of the first axis; ``begin`` and ``end`` count from the start of the tensor."""
    length = prod(shape[1:])
    for offset, size in boxes(shape[1:], begin - row * length, end - row * length):
        yield (row, *offset), (1, *size)
