"""Cross entropy over logits in torch: what ``kernels/cross_entropy.py`` computes, on any device."""

from __future__ import annotations

import torch
from torch import Tensor


def row_statistics(logits: Tensor, labels: Tensor, first_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """What a vocabulary shard contributes to the cross entropy of each row.

    Args:
        logits: (T, V).
        labels: (T,) int64 ids in the whole vocabulary.
        first_id: of this shard.

    Returns:
        (T,) each, float32, or float64 like the logits: the largest logit, the sum of exp(logit - largest), and the
        label's logit (0 where the label is not in this shard).
    """
    wide = _wide(logits)
    largest = wide.amax(dim=1)
    total = (wide - largest[:, None]).exp_().sum(dim=1)
    column, here = _column(labels, first_id, logits.shape[1])
    target = wide.gather(1, column[:, None])[:, 0].where(here, wide.new_zeros(()))
    return largest, total, target


def logits_to_gradient(logits: Tensor, labels: Tensor, first_id: int, log_sum: Tensor, weight: Tensor) -> None:
    """Overwrite logits by weight * (softmax - one-hot of the label).

    Args:
        logits: (T, V).
        labels: (T,) int64 ids in the whole vocabulary.
        first_id: of this shard.
        log_sum: (T,) logarithm of the sum of exp(logit) over the whole vocabulary.
        weight: (T,) gradient of each row's loss.
    """
    gradient = (_wide(logits) - log_sum[:, None]).exp_()
    column, here = _column(labels, first_id, logits.shape[1])
    gradient.scatter_add_(1, column[:, None], -here[:, None].to(gradient.dtype))
    # Not a product: a row without weight may hold Inf.
    logits.copy_(torch.where(weight[:, None] == 0, 0.0, gradient * weight[:, None]))


def _wide(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _column(labels: Tensor, first_id: int, size: int) -> tuple[Tensor, Tensor]:
    """Column of each label in the shard (0 where it is in another one), and whether it is in this one."""
    column = labels - first_id
    here = (column >= 0) & (column < size)
    return column.where(here, column.new_zeros(())), here
