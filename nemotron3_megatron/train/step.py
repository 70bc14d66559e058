"""One optimizer step: micro-batches through the pipeline schedule, gradients finalised, weights updated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from nemotron3_megatron.config.run import Run, Shape
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.data.composition import tags_of
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.platform.transfer import send
from nemotron3_megatron.precision.backend import Backend
from nemotron3_megatron.telemetry.records import TagLoss
from nemotron3_megatron.train.graph import CapturedPasses
from nemotron3_megatron.train.loss import Losses, LossWeights, loss_weights, mean_losses, weighted_loss
from nemotron3_megatron.train.optimizer import Update, set_learning_rate, update
from nemotron3_megatron.train.trainable import is_frozen
from nemotron3_megatron.train.updates import Updates


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one optimizer step; the same on every rank."""

    losses: tuple[float, ...]
    """Mean loss of the main prediction, then of each MTP depth, over the global batch."""
    update: Update
    tags: Mapping[str, TagLoss] = field(default_factory=dict)
    """Main loss by tag (``Losses.tags``)."""


class Judge(Protocol):
    """Decides about steps that look bad (``callbacks.spikes``)."""

    def refuse(self, losses: Sequence[float]) -> str:
        """Why a step with finite gradients must not move weights; empty: it may."""

    def reconsider(self, first: StepResult, again: Callable[[], StepResult]) -> StepResult:
        """The result that counts, given the first one and a way to compute the step again."""


@dataclass(frozen=True, slots=True)
class Trainer:
    """What a step works on."""

    run: Run
    platform: Platform
    groups: ProcessGroupCollection
    model: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    updates: Updates
    backend: Backend = "none"
    """Of the precision plan."""
    captured: CapturedPasses | None = None
    """Runs forward and backward as a CUDA graph; None: kernel by kernel."""
    judge: Judge | None = None
    """None: only steps with non-finite gradients are refused."""

    @property
    def chunks(self) -> list[Nemotron3Model]:
        """The model chunks inside their data-parallel wrappers."""
        return [wrapped.module for wrapped in self.model]

    def release(self) -> None:
        """Call before process groups are stopped."""
        if self.captured is not None:
            self.captured.release()


def train_step(trainer: Trainer, batches: list[MicroBatch], stage: Shape, lr: float) -> StepResult:
    """Forward, backward and update over one global batch.

    Args:
        trainer: model and optimizer.
        batches: this rank's micro-batches.
        stage: gives shapes.
        lr: learning rate of this update.
    """
    attempt = partial(_attempt, trainer, batches, stage, lr)
    result = attempt()
    return result if trainer.judge is None else trainer.judge.reconsider(result, attempt)


def _attempt(trainer: Trainer, batches: list[MicroBatch], stage: Shape, lr: float) -> StepResult:
    biases = {buffer: buffer.clone() for buffer in _expert_biases(trainer)}
    losses = accumulate_gradients(trainer, batches, stage)
    set_learning_rate(trainer.optimizer, lr)
    # Losses are read after the gradients' norm: the GPU has then not waited for the norm's launch.
    refuse = partial(_why_not, trainer, losses)
    outcome = update(trainer.updates, trainer.model, trainer.run.optimizer.clip_grad, refuse)
    for buffer, before in biases.items():
        # Megatron-Core moves the routers' biases with the gradients; a refused step must not move them either.
        if not outcome.applied or is_frozen(buffer):
            buffer.copy_(before)
    read = losses()
    if read.crowded and trainer.captured is not None:
        trainer.captured.make_room()
        return _attempt(trainer, batches, stage, lr)
    return StepResult(read.depths, outcome, read.tags)


def _why_not(trainer: Trainer, losses: Callable[[], Losses]) -> str:
    """Why finite gradients must not move weights; empty: they may."""
    if trainer.captured is not None and losses().crowded:
        return "experts got more rows than a CUDA graph had room for"
    return "" if trainer.judge is None else trainer.judge.refuse(losses().depths)


def accumulate_gradients(trainer: Trainer, batches: list[MicroBatch], stage: Shape) -> Callable[[], Losses]:
    """Forward and backward over one global batch; the reduced gradients are left in the DDP buffers.

    Returns:
        Waits for the losses of these passes.
    """
    for chunk in trainer.model:
        chunk.zero_grad_buffer()
    trainer.updates.forget()
    weights = _weights(trainer, batches)
    sums, crowded = _run_schedule(trainer, batches, stage, weights, forward_only=False)
    return mean_losses(sums, weights, _tags(trainer, batches), crowded)


@torch.no_grad()
def evaluate(trainer: Trainer, batches: Iterator[MicroBatch], stage: Shape) -> Losses:
    """Mean losses over held-out micro-batches; weights and expert biases stay as they are."""
    for chunk in trainer.model:
        chunk.eval()
    held_out = list(batches)
    weights = _weights(trainer, held_out)
    sums, _ = _run_schedule(trainer, held_out, stage, weights, forward_only=True)
    for chunk in trainer.model:
        chunk.train()
    return mean_losses(sums, weights, _tags(trainer, held_out))()


def configure_schedule(trainer: Trainer) -> None:
    """Tell Megatron-Core's schedules how this run's gradients are scaled, finalised and overlapped."""
    config = trainer.chunks[0].config
    config.grad_scale_func = trainer.optimizer.scale_loss
    config.finalize_model_grads_func = _finalize
    if trainer.run.parallel.overlap_grad_reduce:
        config.no_sync_func = _one_or_list([m.no_sync for m in trainer.model])
    if trainer.run.parallel.overlap_param_gather:
        config.param_sync_func = _one_or_list([m.start_param_sync for m in trainer.model])


def _finalize(model: list[DistributedDataParallel], _tokens: Tensor | None, **groups: Any) -> None:
    """Reduce gradients; losses were divided by their tokens already."""
    finalize_model_grads(model, None, **groups)


def _tags(trainer: Trainer, batches: list[MicroBatch]) -> tuple[str, ...]:
    """Names of the tags that the micro-batches carry; made-up ones carry none."""
    return tags_of(trainer.run.data) if any(batch.tags is not None for batch in batches) else ()


def _weights(trainer: Trainer, batches: list[MicroBatch]) -> LossWeights:
    return loss_weights(batches, trainer.run.model, [trainer.groups.dp_cp], trainer.platform.device)


def _run_schedule(
    trainer: Trainer, batches: list[MicroBatch], stage: Shape, weights: LossWeights, *, forward_only: bool
) -> tuple[Tensor, Tensor | None]:
    """Run all micro-batches.

    Returns:
        On every rank, summed over all: the losses of the global batch (1 + D + T,), and () how many layers lacked room;
        None without a graph.
    """
    inputs = [
        _model_inputs(trainer, batch, ends) for batch, ends in zip(batches, _boundaries(trainer, batches), strict=True)
    ]
    captured = None if forward_only else trainer.captured
    if captured is None:
        sums = _passes(trainer, inputs, stage, weights, forward_only=forward_only)
    else:
        sums = _captured_passes(trainer, captured, inputs, stage, weights)
        sums = torch.cat([sums, captured.rooms.crowded(sums.device)])
    # Only the last pipeline stage has losses; zeros elsewhere.
    for group in (trainer.groups.dp_cp, trainer.groups.pp):
        torch.distributed.all_reduce(sums, group=group)
    return (sums, None) if captured is None else (sums[:-1], sums[-1])


def _boundaries(trainer: Trainer, batches: list[MicroBatch]) -> list[Tensor] | list[None]:
    """Document boundaries of each micro-batch, all in one shape: a CUDA graph is made for each combination."""
    if not trainer.run.data.isolate_documents or trainer.groups.cp.size() > 1:
        return [None] * len(batches)
    found = [batch.boundaries() for batch in batches]
    longest = max(map(len, found))
    return [torch.cat([each, each[-1:].expand(longest - len(each))]) for each in found]


def _model_inputs(trainer: Trainer, batch: MicroBatch, boundaries: Tensor | None) -> ModelInputs:
    device = trainer.platform.device
    ends = None if boundaries is None else send(boundaries, device)
    there = batch.to(device)
    documents = there.documents if trainer.run.data.isolate_documents else None
    return ModelInputs(there.tokens, there.position_ids, there.labels, there.loss_mask, documents, ends, there.tags)


def _passes(
    trainer: Trainer, inputs: list[ModelInputs], stage: Shape, weights: LossWeights, *, forward_only: bool
) -> Tensor:
    """Forward, and backward unless ``forward_only``, of this rank's micro-batches -> summed losses (1 + D + T,)."""
    chunks = trainer.model
    trainer.chunks[0].config.moe_grad_scale_func = lambda: weights.balancing
    reports: list[Tensor] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, weights=weights),
        data_iterator=_one_or_list([iter(inputs) for _ in chunks]),
        model=_one_or_list(chunks),
        num_microbatches=len(inputs),
        seq_length=stage.seq_length,
        micro_batch_size=stage.micro_batch_size,
        decoder_seq_length=stage.seq_length,
        forward_only=forward_only,
    )
    return torch.stack(reports).sum(dim=0) if reports else torch.zeros_like(weights.counts, dtype=torch.float32)


def _captured_passes(
    trainer: Trainer, captured: CapturedPasses, inputs: list[ModelInputs], stage: Shape, weights: LossWeights
) -> Tensor:
    """The same as a CUDA graph, with what DDP moves beside it; gradients are finalised after it."""

    def passes(tensors: list[Tensor]) -> Tensor:
        scales, balancing, *rest = tensors
        parts = iter(rest)
        own = [ModelInputs._make(None if field is None else next(parts) for field in each) for each in inputs]
        static = replace(weights, scales=scales, balancing=balancing)
        sums = _passes(trainer, own, stage, static, forward_only=False)
        if trainer.run.parallel.overlap_grad_reduce:
            for wrapped in trainer.model:
                wrapped.finish_grad_sync()
        return sums

    if trainer.run.parallel.overlap_param_gather:
        for wrapped in trainer.model:
            # A validation before has gathered them; a graph holds the gathering whenever it is captured.
            wrapped.reset_param_sync_dispatch_state()
    tensors = [field for each in inputs for field in each if field is not None]
    config = trainer.chunks[0].config
    finalize, config.finalize_model_grads_func = config.finalize_model_grads_func, None
    sums = captured(passes, [weights.scales, weights.balancing, *tensors])
    config.finalize_model_grads_func = finalize
    if trainer.run.parallel.overlap_grad_reduce:
        _tell_reduced(trainer.model)
    finalize(trainer.model, None, pg_collection=trainer.groups)
    return sums


def _tell_reduced(model: Sequence[DistributedDataParallel]) -> None:
    """What DDP would know if its hooks had run."""
    for wrapped in model:
        for group in (*wrapped.bucket_groups, *wrapped.expert_parallel_bucket_groups):
            group.grad_reduce_finished = True


class ModelInputs(NamedTuple):
    """A micro-batch on the device (``MicroBatch``), as the model and its loss read it."""

    tokens: Tensor
    position_ids: Tensor
    labels: Tensor
    loss_mask: Tensor
    documents: Tensor | None
    """None: not isolated."""
    boundaries: Tensor | None
    tags: Tensor | None
    """None: losses are not told apart."""


def _forward_step(
    iterator: Iterator[ModelInputs], model: DistributedDataParallel, *, weights: LossWeights
) -> tuple[Tensor, Any]:
    batch = next(iterator)
    output = model(
        batch.tokens,
        batch.position_ids,
        labels=batch.labels,
        documents=batch.documents,
        boundaries=batch.boundaries,
    )
    return output, partial(weighted_loss, loss_mask=batch.loss_mask, weights=weights, tags=batch.tags)


def _expert_biases(trainer: Trainer) -> list[Tensor]:
    return [b for chunk in trainer.chunks for name, b in chunk.named_buffers() if name.endswith("expert_bias")]


def _one_or_list(items: list[Any]) -> Any:
    """Megatron-Core's schedules take a bare item for one chunk and a list for several."""
    return items[0] if len(items) == 1 else items
