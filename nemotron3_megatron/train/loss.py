"""The training loss over a global batch, normalised by global token counts.

    loss = sum(main) / N_0 + (factor / D) * sum over depths d of sum(mtp_d) / N_d

N_0 counts the tokens of the whole global batch that carry main loss, N_d those of MTP depth d; both are known
from the data before the first forward pass, so that each token's loss is divided before its gradient is taken, and
gradients are the same whatever ranks and micro-batches tokens fall on. Megatron-Core would divide all gradients at
the end of the step, which reads and writes every one of them again. The weight ``factor / D`` per depth is
Megatron-Core's (core/transformer/multi_token_prediction.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.platform.transfer import read_later, send
from nemotron3_megatron.telemetry.records import TagLoss


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How the per-token losses of one step add up."""

    counts: Tensor
    """(1 + D + T,) float64 tokens of the global batch with loss at each depth, then with main loss under each tag."""
    scales: Tensor
    """(1 + D,) float32 factor of each depth's summed loss."""
    balancing: Tensor
    """() float32 factor of the router's balancing loss: one over the batch's tokens.

    Megatron-Core multiplies the balancing loss of each micro-batch by its token count.
    """


@dataclass(frozen=True, slots=True)
class Losses:
    """Means over a global batch, in nats per token."""

    depths: tuple[float, ...]
    """Of the main prediction, then of each MTP depth; NaN where no token carries loss."""
    tags: Mapping[str, TagLoss] = field(default_factory=dict)
    """Main loss by tag of the sources, of those that were read; empty where the data has none."""
    crowded: bool = False
    """Experts got more rows than a CUDA graph had room for: neither losses nor gradients count."""


def loss_weights(
    batches: list[MicroBatch], model: ModelConfig, groups: list[ProcessGroup], device: torch.device
) -> LossWeights:
    """Count the step's loss-carrying tokens over all ranks and derive the weight of each depth.

    Args:
        batches: this rank's micro-batches of the step.
        model: MTP depths and factor.
        groups: groups over whose product the batch is spread (data and context parallel).
        device: where collectives run.
    """
    each = [_with_tags(b.loss_mask.sum(dim=(1, 2), dtype=torch.float64), b.loss_mask[0], b.tags) for b in batches]
    counts = send(torch.stack(each).sum(dim=0), device)
    for group in groups:
        torch.distributed.all_reduce(counts, group=group)
    depths = counts[: 1 + model.mtp_depths]
    scales = depths.clamp(min=1).reciprocal()
    if model.mtp_depths:
        scales[1:] *= model.mtp_loss_scaling_factor / model.mtp_depths
    tokens = sum(batch.loss_mask[0].numel() for batch in batches) * math.prod(group.size() for group in groups)
    return LossWeights(counts, scales.float(), torch.full((), 1 / tokens, device=device))


def weighted_loss(
    losses: Tensor, loss_mask: Tensor, weights: LossWeights, tags: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Combine one micro-batch's losses for the pipeline schedule.

    Args:
        losses: (1 + D, b, s) float32.
        loss_mask: (1 + D, b, s) float32.
        weights: of the whole step.
        tags: (b, T) bool, as in :class:`MicroBatch`.

    Returns:
        The scalar to differentiate, this micro-batch's part of the loss above; zero tokens for Megatron-Core to divide
        by (it is not asked to); and for reports the summed loss of each depth, then the summed main loss of each tag:
        (1 + D + T,).
    """
    masked = losses * loss_mask
    sums = masked.sum(dim=(1, 2))
    reported = _with_tags(sums.detach(), masked[0].detach(), tags)
    return (sums * weights.scales).sum(), torch.zeros((), dtype=torch.int32, device=sums.device), reported


def mean_losses(
    sums: Tensor, weights: LossWeights, tags: Sequence[str] = (), crowded: Tensor | None = None
) -> Callable[[], Losses]:
    """Means from what ``weighted_loss`` reported, summed over the global batch (1 + D + T,), and the tags' names.

    ``crowded``: () of ``rooms.py``, summed over all ranks; None: nobody lacked room.

    The function returned waits for them, not for what was launched since.
    """
    means = torch.where(weights.counts > 0, sums.double() / weights.counts, torch.nan)
    lacked = [] if crowded is None else [crowded.to(means).expand_as(means)]
    table = read_later(torch.stack([means, weights.counts, *lacked]))

    def read() -> Losses:
        losses, tokens, *without_room = table().tolist()
        first = len(losses) - len(tags)
        told = zip(tags, losses[first:], tokens[first:], strict=True)
        by_tag = {tag: TagLoss(loss, int(count)) for tag, loss, count in told if count}
        return Losses(tuple(losses[:first]), by_tag, crowded=any(map(any, without_room)))

    return read


def _with_tags(sums: Tensor, main: Tensor, tags: Tensor | None) -> Tensor:
    """Sums of each depth (1 + D,) -> with those of ``main`` (b, s) over the sequences of each tag behind them.

    Not a product with the tags as ones and zeros: a loss that is not finite must stay with its own tag.
    """
    if tags is None:
        return sums
    by_sequence = main.sum(dim=1, dtype=sums.dtype)[:, None]
    return torch.cat([sums, torch.where(tags, by_sequence, 0).sum(dim=0)])
