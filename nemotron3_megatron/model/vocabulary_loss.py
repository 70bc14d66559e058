"""Output layer and cross entropy in one.

Logits exist once, in the model's type, and become their own gradient; at great lengths they exist in parts only.

Shapes: S local sequence, B batch, T = S * B rows, H hidden, V vocabulary shard of this tensor-parallel rank.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from torch import Tensor
from torch.distributed import ProcessGroup

from nemotron3_megatron.model.logits import LOGITS_BYTES, rows_at_a_time
from nemotron3_megatron.model.wgrad import weight_gradient


def vocabulary_loss(
    hidden: Tensor, output_layer: ColumnParallelLinear, labels: Tensor, limit_bytes: int = LOGITS_BYTES
) -> Tensor:
    """Cross entropy of every position.

    Args:
        hidden: (S, B, H), or this rank's part of the sequence under sequence parallelism.
        output_layer: Megatron-Core's, bias-free; its weight is (V, H).
        labels: (B, S) int64 ids in the whole vocabulary.
        limit_bytes: logits beyond it are made in parts, twice.

    Returns:
        (B, S) float32 (float64 of a float64 model).
    """
    group = output_layer.tp_group
    if output_layer.sequence_parallel:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    elif group.size() > 1:
        hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
    length, batch, width = hidden.shape
    weight, fused = output_layer.weight, output_layer.config.gradient_accumulation_fusion
    part = rows_at_a_time(length * batch, weight.shape[0], hidden.element_size(), limit_bytes)
    flat = labels.transpose(0, 1).reshape(-1)
    losses: Tensor = _VocabularyLoss.apply(  # type: ignore[no-untyped-call]
        hidden.reshape(-1, width), weight, flat, group, fused, part
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
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, group: ProcessGroup, fused: bool, part: int
    ) -> Tensor:
        compute, first_id = _cross_entropy(hidden), group.rank() * weight.shape[0]
        found, logits = [], None
        for rows, ids in zip(hidden.split(part), labels.split(part), strict=True):
            logits = rows @ weight.T
            found.append(compute.row_statistics(logits, ids, first_id))
        largest, total, target = (torch.cat(each) for each in zip(*found, strict=True))
        if group.size() > 1:
            highest = largest.clone()
            torch.distributed.all_reduce(highest, op=torch.distributed.ReduceOp.MAX, group=group)
            parts = torch.stack([total * (largest - highest).exp(), target])
            torch.distributed.all_reduce(parts, group=group)
            largest, (total, target) = highest, parts
        log_sum = total.log() + largest
        ctx.save_for_backward(hidden, weight, labels, logits if len(found) == 1 else None, log_sum)
        ctx.first_id, ctx.fused, ctx.part = first_id, fused, part
        return log_sum - target

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, labels, kept, log_sum = ctx.saved_tensors
        compute = _cross_entropy(hidden)
        scales = gradients[0].to(log_sum.dtype).contiguous()
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight: Tensor | None = None
        for start in range(0, hidden.shape[0], ctx.part):
            rows = slice(start, start + ctx.part)
            logits = hidden[rows] @ weight.T if kept is None else kept
            compute.logits_to_gradient(logits, labels[rows], ctx.first_id, log_sum[rows], scales[rows])
            if d_hidden is not None:
                torch.matmul(logits, weight, out=d_hidden[rows])
            if ctx.needs_input_grad[1]:
                gradient = weight_gradient(logits, hidden[rows], weight, fused=ctx.fused)
                d_weight = gradient if d_weight is None or ctx.fused else d_weight.to(log_sum.dtype) + gradient
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _cross_entropy(hidden: Tensor) -> ModuleType:
    """Kernels on a GPU, torch elsewhere."""
    if hidden.is_cuda:
        from nemotron3_megatron.model.kernels import cross_entropy as kernels

        return kernels
    from nemotron3_megatron.model import cross_entropy

    return cross_entropy
