"""The training loss over a global batch, normalised by global token counts.

    loss = sum(main) / N_0 + (factor / D) * sum over depths d of sum(mtp_d) / N_d

N_0 counts the tokens of the whole global batch that carry main loss, N_d those of MTP depth d; both are known
from the data before the first forward pass. The weight ``factor / D`` per depth is Megatron-Core's
(core/transformer/multi_token_prediction.py). Megatron-Core divides all gradients by N_0 at the end of the step, so
depth d is scaled by N_0 / N_d here: gradients are then the same whatever ranks and micro-batches tokens fall on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.data.batch import MicroBatch


@dataclass(frozen=True, slots=True)
class LossWeights:
    """How the per-token losses of one step add up."""

    counts: Tensor
    """(1 + D,) float64 tokens of the global batch with loss at each depth."""
    scales: Tensor
    """(1 + D,) float32 factor of each depth's summed loss; the main loss has 1."""
    balancing: Tensor
    """() float32 factor of the router's balancing loss: the share of the batch's tokens that carry main loss.

    Megatron-Core multiplies the balancing loss of each micro-batch by its token count and expects gradients to be
    divided by all tokens of the batch; here they are divided by the tokens that carry loss.
    """


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
    counts = torch.stack([b.loss_mask.sum(dim=(1, 2), dtype=torch.float64) for b in batches]).sum(dim=0).to(device)
    for group in groups:
        torch.distributed.all_reduce(counts, group=group)
    scales = torch.ones_like(counts)
    if model.mtp_depths:
        share = model.mtp_loss_scaling_factor / model.mtp_depths
        scales[1:] = share * counts[0] / counts[1:].clamp(min=1)
    tokens = sum(batch.loss_mask[0].numel() for batch in batches) * math.prod(group.size() for group in groups)
    return LossWeights(counts, scales.float(), (counts[0] / tokens).float())


def weighted_loss(losses: Tensor, loss_mask: Tensor, weights: LossWeights) -> tuple[Tensor, Tensor, Tensor]:
    """Combine one micro-batch's losses for the pipeline schedule.

    Args:
        losses: (1 + D, b, s) float32.
        loss_mask: (1 + D, b, s) float32.
        weights: of the whole step.

    Returns:
        The scalar to differentiate (a sum over tokens), the number of main-loss tokens as int32 (Megatron-Core
        sums it over ranks and divides gradients by it), and the summed loss of each depth (1 + D,) for reports.
    """
    sums = (losses * loss_mask).sum(dim=(1, 2))
    return (sums * weights.scales).sum(), loss_mask[0].sum().to(torch.int32), sums.detach()


def mean_losses(sums: Tensor, weights: LossWeights) -> list[float]:
    """Summed losses of the global batch (1 + D,) -> mean loss of each depth; NaN where no token carries loss."""
    means: list[float] = torch.where(weights.counts > 0, sums.double() / weights.counts, torch.nan).tolist()
    return means
