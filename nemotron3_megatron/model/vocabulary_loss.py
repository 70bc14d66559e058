"""Output layer and cross entropy in one: the logits exist once, in the model's type, and become their own gradient.

Shapes: S local sequence, B batch, T = S * B rows, H hidden, V vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron3_megatron.model.wgrad import weight_gradient


def vocabulary_loss(hidden: Tensor, output_layer: ColumnParallelLinear, labels: Tensor) -> Tensor:
    """Cross entropy of every position.

    Args:
        hidden: (S, B, H), or this rank's part of the sequence under sequence parallelism.
        output_layer: Megatron-Core's, bias-free; its weight is (V, H).
        labels: (B, S) int64 ids in the whole vocabulary.

    Returns:
        (B, S) float32.
    """
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    elif group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    length, batch, width = hidden.shape
    flat = labels.transpose(0, 1).reshape(-1)
    losses: Tensor = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, width), output_layer.weight, flat, group, output_layer.config.gradient_accumulation_fusion
    )
    return losses.view(length, batch).transpose(0, 1)


def losses_or_logits(
    output_layer: ColumnParallelLinear, hidden: Tensor, *args: Any, labels: Tensor | None = None, **kwargs: Any
) -> Any:
    """The output layer's ``forward``: with ``labels`` :func:`vocabulary_loss`, without them its own.

    The loss is made inside a call of the module because DDP's hooks wait there for its gathered weight.
    """
    if labels is not None:
        return vocabulary_loss(hidden, output_layer, labels)
    return type(output_layer).forward(output_layer, hidden, *args, **kwargs)


class _VocabularyLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: ProcessGroup, fused: bool) -> Tensor:
        from nemotron3_megatron.model.kernels.cross_entropy import row_statistics

        logits = hidden @ weight.T
        first_id = group.rank() * weight.shape[0]
        largest, total, target = row_statistics(logits, labels, first_id)
        if group.size() > 1:
            highest = largest.clone()
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX, group=group)
            parts = torch.stack([total * (largest - highest).exp(), target])
            torch.distributed.all_reduce(parts, group=group)
            largest, (total, target) = highest, parts
        log_sum = total.log() + largest
        ctx.save_for_backward(hidden, weight, labels, logits, log_sum)
        ctx.first_id, ctx.fused = first_id, fused
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        from nemotron3_megatron.model.kernels.cross_entropy import logits_to_gradient

        hidden, weight, labels, logits, log_sum = ctx.saved_tensors
        logits_to_gradient(logits, labels, ctx.first_id, log_sum, gradients[0].float().contiguous())
        d_hidden = logits @ weight if ctx.needs_input_grad[0] else None
        d_weight = weight_gradient(logits, hidden, weight, fused=ctx.fused) if ctx.needs_input_grad[1] else None
        return d_hidden, d_weight, None, None, None
