"""What ranks do in the tests of planned activations: bytes of torch's allocator during real passes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from layouts import started
from megatron.core.transformer.moe import moe_logging
from tiny import EOD, tiny_run
from torch._C._profiler import _EventType
from torch.profiler import profile

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.plan.activation_shape import shape
from nemotron3_megatron.plan.activations import logits
from nemotron3_megatron.plan.memory import memory_plan
from nemotron3_megatron.plan.parameters import chunks
from nemotron3_megatron.train.step import Trainer, accumulate_gradients

AFTER_FORWARD, START = 54_321, 12_345
"""Sizes of marks among the allocations: nothing else has them."""


def sized_run(
    world_size: int,
    *,
    length: int = 256,
    rows: int = 1,
    micro_batches: int = 1,
    vocabulary: int = 512,
    **options: Any,
) -> Run:
    """Every size is its own, so that no two terms of the plan look alike; all large against a few hundred bytes."""
    run = tiny_run(world_size, **options)
    model = replace(
        run.model,
        hidden_size=64,
        vocab_size=vocabulary,
        kv_channels=24,
        ffn_hidden_size=176,
        mamba_head_dim=20,
        mamba_state_dim=12,
        mamba_chunk_size=32,
        moe_router_topk=3,
        moe_ffn_hidden_size=56,
        moe_shared_expert_intermediate_size=104,
        moe_latent_size=options.get("latent", 40),
    )
    batch = rows * micro_batches * run.layout.dp
    stage = replace(
        run.stages[0],
        seq_length=length,
        micro_batch_size=rows,
        global_batch_size=batch,
        num_microbatches=micro_batches,
        tokens_per_step=length * batch,
    )
    return replace(run, model=model, stages=(stage,))


def measured(worlds: list[dict[str, Any]]) -> list[dict[str, int]]:
    """Of each world on this rank: bytes kept after the forward pass and at the peak, measured and planned."""
    port = int(os.environ["MASTER_PORT"])
    results = []
    for offset, options in enumerate(worlds):
        os.environ["MASTER_PORT"] = str(port + offset)
        moe_logging.destroy_moe_metrics_tracker()  # its tensors have the length of the last world's stack
        with started(dict(options), sized_run) as trainer:
            kept, peak = _allocated(_passes(trainer, _batches(trainer)))
            results.append({"kept": kept, "peak": peak} | _planned(trainer))
    return results


def _passes(trainer: Trainer, batches: list[MicroBatch]) -> Callable[[], Iterator[None]]:
    """Forward, a stop, and backward; of several micro-batches or stages, both by the schedule after the stop."""
    run, stage = trainer.run, trainer.run.stages[0]
    if run.layout.pp > 1 or len(batches) > 1:

        def passes() -> Iterator[None]:
            yield
            accumulate_gradients(trainer, batches, stage)

        return passes
    (batch,) = batches
    isolated = run.data.isolate_documents
    boundaries = batch.boundaries() if isolated and run.layout.cp == 1 else None

    def pass_once() -> Iterator[None]:
        losses = trainer.model[0](
            batch.tokens,
            batch.position_ids,
            labels=batch.labels,
            documents=batch.documents if isolated else None,
            boundaries=boundaries,
        )
        yield
        losses.sum().backward()

    return pass_once


def _allocated(passes: Callable[[], Iterator[None]]) -> tuple[int, int]:
    """Bytes that exist where ``passes`` stops, and most that ever did, beyond those at the start."""
    with profile(profile_memory=True) as trace:
        start = torch.empty(START, dtype=torch.int8)
        steps = passes()
        next(steps)
        if torch.distributed.get_world_size() > 1:
            time.sleep(0.3)  # gloo's threads let go of what they sent a moment after it has arrived
        mark = torch.empty(AFTER_FORWARD, dtype=torch.int8)
        del mark
        next(steps, None)
    del start
    events = sorted(_allocations(trace.profiler.kineto_results.experimental_event_tree()))
    sizes = [size for _, size, _ in events]
    first, stop = sizes.index(START), sizes.index(AFTER_FORWARD)
    base = events[first][2]
    return events[stop][2] - AFTER_FORWARD - base, max(total for _, _, total in events[first:]) - base


def _allocations(nodes: list[Any]) -> Iterator[tuple[int, int, int]]:
    """Time, size (negative: freed) and the total then, of every allocation below ``nodes``."""
    for node in nodes:
        if node.tag == _EventType.Allocation:
            yield node.start_time_ns, node.extra_fields.alloc_size, node.extra_fields.total_allocated
        yield from _allocations(node.children)


def _batches(trainer: Trainer) -> list[MicroBatch]:
    """Two documents, the second of which reaches from an early position to the end."""
    run, stage = trainer.run, trainer.run.stages[0]
    shape = (stage.micro_batch_size, stage.seq_length + 1)
    rank, size = trainer.groups.cp.rank(), trainer.groups.cp.size()
    found = []
    for index in range(stage.num_microbatches):
        seed = torch.Generator().manual_seed(index)
        tokens = torch.randint(1, run.model.vocab_size, shape, generator=seed)
        tokens[:, 10] = EOD
        isolated = run.data.isolate_documents
        batch = build_micro_batch(tokens, mtp_depths=run.model.mtp_depths, eod_token=EOD, isolate_documents=isolated)
        found.append(batch.shard(rank, size))
    return found


def _planned(trainer: Trainer) -> dict[str, int]:
    run, rank = trainer.run, trainer.groups.pp.rank()
    memory = memory_plan(run).ranks[rank]
    at = shape(run, run.stages[0])
    has_loss = any(logits(at, chunk) for chunk in chunks(run, rank))
    # Logits and the logarithm of their sum, of all depths.
    after = (1 + run.model.mtp_depths) * at.tokens * (at.value * run.model.vocab_size // run.layout.tp + 4)
    return {
        "planned_kept": memory.activations + (after if has_loss else 0),
        "planned_peak": memory.activations + memory.logits + memory.transient,
    }
