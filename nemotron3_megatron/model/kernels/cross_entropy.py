"""Cross entropy over logits that stay where they are: one pass forward, one in place backward.

A row of Nemotron 3's vocabulary (131,072 logits in BF16) is 256 KiB, read once for its statistics and once more,
overwritten by its gradient. Each program has a row, since 8192 rows fill any GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096
_WARPS = 8


def row_statistics(logits: Tensor, labels: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a vocabulary shard contributes to the cross entropy of each row.

    Args:
        logits: (T, V) contiguous.
        labels: (T,) int64 ids in the whole vocabulary.
        first_id: of this shard.

    Returns:
        Float32 (T,) each: the largest logit, the sum of exp(logit - largest), and the label's logit (0 where the label
        is not in this shard).
    """
    rows = logits.shape[0]
    largest, total, target = (torch.empty(rows, dtype=torch.float32, device=logits.device) for _ in range(3))
    if rows:
        _statistics[(rows,)](
            logits, labels, largest, total, target, first_id, logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS
        )
    return largest, total, target


def logits_to_gradient(logits: Tensor, labels: Tensor, first_id: int, log_sum: Tensor, weight: Tensor) -> None:
    """Overwrite logits by weight * (softmax - one-hot of the label).

    Args:
        logits: (T, V) contiguous.
        labels: (T,) int64 ids in the whole vocabulary.
        first_id: of this shard.
        log_sum: (T,) float32 logarithm of the sum of exp(logit) over the whole vocabulary.
        weight: (T,) float32 gradient of each row's loss; rows of weight 0 are not read.
    """
    rows = logits.shape[0]
    if rows:
        _gradient[(rows,)](logits, labels, log_sum, weight, first_id, logits.shape[1], BLOCK=_BLOCK, num_warps=_WARPS)


@triton.jit
def _statistics(logits, labels, largest, total, target, first_id, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    running = tl.full((BLOCK,), -float("inf"), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float32)
    # A maximum and a sum for each lane, brought together once at the end.
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(base + column, mask=column < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(running, value)
        # Lanes past the end keep -inf, whose difference is NaN.
        shift = tl.where(higher == -float("inf"), 0.0, higher)
        sums = sums * tl.exp(running - shift) + tl.exp(value - shift)
        running = higher
    top = tl.max(running, 0)
    tl.store(largest + row, top)
    tl.store(total + row, tl.sum(sums * tl.exp(running - top), 0))
    label = tl.load(labels + row) - first_id
    # Of another shard: unsigned, a negative number is large as well.
    here = label.to(tl.uint64) < V
    tl.store(target + row, tl.load(base + tl.where(here, label, 0), mask=here, other=0.0).to(tl.float32))


@triton.jit
def _gradient(logits, labels, log_sum, weight, first_id, V, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    base = logits + row * V
    scale = tl.load(weight + row)
    label = tl.load(labels + row) - first_id
    normaliser = tl.load(log_sum + row)
    read = tl.where(scale == 0, 0, V)
    for start in range(0, V, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = tl.load(base + column, mask=column < read, other=0.0).to(tl.float32)
        gradient = scale * (tl.exp(value - normaliser) - tl.where(column == label, 1.0, 0.0))
        gradient = tl.where(scale == 0, 0.0, gradient)
        tl.store(base + column, gradient.to(logits.dtype.element_ty), mask=column < V)
