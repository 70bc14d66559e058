"""Memory of a rank, by pipeline stage and term, in bytes of torch's allocator.

Weights, gradients and optimizer state are exact (``plan/buffers.py``); activations and transients follow what the
run's module spec saves (``plan/activations.py``). Not counted, for they lie outside the allocator: the CUDA context,
NCCL's buffers and kernels, 1 to 3 GiB together; and what the allocator loses to fragments.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.plan.activation_shape import Kept, Shape, shape
from nemotron3_megatron.plan.activations import ends, layer, logits, mtp_depth
from nemotron3_megatron.plan.buffers import Buffer, buffers, optimizer_bytes, weight_bytes
from nemotron3_megatron.plan.parameters import Chunk, Parameter, chunk_parameters, chunks, router_buffer_bytes
from nemotron3_megatron.plan.quantised import weight_bytes_kept
from nemotron3_megatron.precision.policy import Role

GIB = 2**30
CUBLAS_WORKSPACE = 32 * 2**20
"""Transformer Engine's and torch's, each so large on Hopper and later."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest rank of a pipeline stage, when it holds most."""

    weights: int
    """Parameters, padded where the distributed optimizer gathers them, and the routers' biases."""
    gradients: int
    """FP32, padded."""
    optimizer: int
    """FP32 master weights and two moments, whole or this rank's shard."""
    activations: int
    """Of all micro-batches in flight."""
    logits: int
    """Logits of all depths, which are their own gradient; on a CPU also what that takes. Never there together with
    ``transient``."""
    transient: int
    """Most that a layer's backward pass needs for itself beyond ``logits`` and what came behind it, which are given
    back by then: gradients, gathered and sent tokens."""
    quantised_weights: int
    """What the precision backend keeps of quantised weights between micro-batches."""
    workspace: int
    """cuBLAS, and Transformer Engine's placeholders for gradients that went into the buffers."""

    @property
    def total(self) -> int:
        """Sum of the terms."""
        return sum(getattr(self, name) for name in TERMS)

    def in_gib(self) -> dict[str, float]:
        """``total`` and every term, in GiB."""
        return {name: getattr(self, name) / GIB for name in ("total", *TERMS)}


TERMS = tuple(item.name for item in fields(Memory))


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """The memory of every pipeline rank, in the hungriest of the stages that share the run's layout."""

    ranks: tuple[Memory, ...]
    """By pipeline rank."""
    stage: Stage
    """Of the curriculum, in the hungriest of its shapes."""
    checkpoint_host: int
    """Bytes of CPU memory that a rank needs while it saves in the background: its weights and optimizer state."""

    @property
    def fullest_rank(self) -> int:
        """Pipeline rank that holds most."""
        return max(range(len(self.ranks)), key=lambda rank: self.ranks[rank].total)

    @property
    def fullest(self) -> Memory:
        """Its memory."""
        return self.ranks[self.fullest_rank]


def memory_plan(run: Run, *, imbalance: float = 1.0) -> MemoryPlan:
    """Plan the memory of every pipeline rank.

    Args:
        run: resolved.
        imbalance: tokens of the fullest expert-parallel rank over the mean (at most
            ``activation_shape.largest_imbalance``).
    """
    kept = weight_bytes_kept(run)
    shapes = [part for stage in run.own_stages[::-1] for part in stage.by_shape()[::-1]]
    alike = {(part.seq_length, part.micro_batch_size, part.num_microbatches): part for part in shapes}
    plans = [_plan(shape(run, stage, imbalance), stage, kept) for stage in reversed(alike.values())]
    return max(plans, key=lambda plan: plan.fullest.total)


def _plan(at: Shape, stage: Stage, kept: dict[Role, float]) -> MemoryPlan:
    ranks = tuple(_rank_memory(at, stage, kept, rank) for rank in range(at.run.layout.pp))
    return MemoryPlan(ranks, stage, max(memory.weights + memory.optimizer for memory in ranks))


def _rank_memory(at: Shape, stage: Stage, kept: dict[Role, float], pp_rank: int) -> Memory:
    run = at.run
    mine = chunks(run, pp_rank)
    parameters = [chunk_parameters(run, chunk) for chunk in mine]
    held = [buffer for part in parameters for buffer in buffers(run, part, pp_rank)]
    saved = [_chunk_activations(at, chunk) for chunk in mine]
    flying = in_flight(run, stage.num_microbatches, pp_rank)
    logit_bytes = sum(logits(at, chunk) for chunk in mine)
    transient = max(each.transient for each in saved)
    quantised = sum(p.size * kept[p.role] for part in parameters for p in part if p.role is not None)
    return Memory(
        weights=sum(weight_bytes(run, b) for b in held) + sum(router_buffer_bytes(run, chunk) for chunk in mine),
        gradients=sum(4 * buffer.size for buffer in held),
        optimizer=_fullest_optimizer(run, held),
        activations=sum(count * each.saved for count, each in zip(flying, saved, strict=True)),
        logits=logit_bytes,
        transient=max(0, transient - logit_bytes - sum(ends(at, chunk) for chunk in mine)),
        quantised_weights=round(quantised),
        workspace=_workspace(at, parameters),
    )


def _chunk_activations(at: Shape, chunk: Chunk) -> Kept:
    """Every depth saves anew, also where depths share one block."""
    parts = [(count, layer(at, symbol)) for symbol, count in Counter(chunk.layers).items()]
    if chunk.last and at.model.mtp_depths:
        parts.append((at.model.mtp_depths, mtp_depth(at)))
    saved = sum(count * kept.saved for count, kept in parts)
    return Kept(saved + ends(at, chunk), max(kept.transient for _, kept in parts))


def in_flight(run: Run, micro_batches: int, pp_rank: int) -> tuple[int, ...]:
    """Micro-batches whose activations each model chunk of a rank holds when most are held.

    1F1B: one more than the ranks behind. Interleaved: the warm-up passes through the chunks in turn, pp micro-batches
    each (core/pipeline_parallel/schedules.py ``get_pp_rank_microbatches``); the first chunks hold most.
    """
    pp, vpp = run.layout.pp, run.layout.vpp
    if vpp == 1:
        return (min(micro_batches, pp - pp_rank),)
    passes = min(micro_batches * vpp, 2 * (pp - pp_rank - 1) + (vpp - 1) * pp + 1)
    counts = Counter(index // pp % vpp for index in range(passes))
    return tuple(counts[chunk] for chunk in range(vpp))


def _fullest_optimizer(run: Run, held: list[Buffer]) -> int:
    """State on the fullest data-parallel rank, dense and expert parameters alike.

    Ranks of the two kinds of groups meet in every combination only roughly; they differ by padding.
    """
    return sum(
        max(map(sum, zip(*(optimizer_bytes(run, b) for b in held if b.expert == expert), strict=True)), default=0)
        for expert in (False, True)
    )


def _workspace(at: Shape, parameters: list[tuple[Parameter, ...]]) -> int:
    if at.spec == "te":
        return 2 * CUBLAS_WORKSPACE + _placeholders(at.run, parameters)
    return 0 if at.on_cpu else CUBLAS_WORKSPACE


def _placeholders(run: Run, parameters: list[tuple[Parameter, ...]]) -> int:
    """One BF16 tensor for each shape of linear weight (Transformer Engine ``get_dummy_wgrad``)."""
    model, tp = run.model, run.layout.tp
    shapes = {p.shape for part in parameters for p in part if p.role is not None}
    output = (model.vocab_size // tp, model.hidden_size)
    if any(p.shape == output for p in parameters[-1][-1:]):
        shapes.add(output)
    return sum(2 * width * height for width, height in shapes)
