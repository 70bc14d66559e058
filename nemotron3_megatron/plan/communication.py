"""Bytes that each collective of an optimizer step puts on the wire, per rank.

Bytes are those that one rank sends with an algorithm of least traffic: (n - 1) / n of the whole buffer for an
all-gather, a reduce-scatter or a balanced all-to-all over n ranks, twice that for an all-reduce. Left out, because
they are thousands of times smaller: routers' token counts, the loss and its softmax's maxima and sums (a few FP32
numbers a token), gradient norms, loss counts, and the padding of gradient buckets.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from nemotron3_megatron.config.experts import gathers_tokens
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.config.sizes import Kind
from nemotron3_megatron.plan.segments import Segment, kinds, segments, weights

Operation = Literal["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "send"]
GroupName = Literal["tp", "cp", "ep", "etp", "dp", "expert_dp", "pp", "embedding"]

PROBABILITY_BYTES = 4
"""A routed token's gate travels in FP32 (Megatron-Core ``MoEAlltoAllTokenDispatcher.token_dispatch``)."""
GRADIENT_BYTES = 4
"""Gradients are accumulated and reduced in FP32."""


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks that communicate: ``size`` of them, ``stride`` apart (Megatron-Core's order of ranks: tp-cp-ep-dp-pp)."""

    name: GroupName
    size: int
    stride: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """All calls of one kind in an optimizer step of one rank."""

    what: str
    operation: Operation
    group: Group
    per: Literal["layer", "step"]
    """layer: in the path of every micro-batch; step: once, beside the computation where overlapped."""
    bytes: float
    copies: int = 1
    """Of each row, of which a hierarchical dispatcher (flex) sends one to each NVLink domain; 1: sends all."""


def communication(run: Run, pp_rank: int, stage: Stage | None = None) -> tuple[Collective, ...]:
    """Every collective of an optimizer step on a rank of pipeline rank ``pp_rank``; groups of one rank are left out.

    Routing is taken as balanced: a rank receives as many tokens as it sends.
    """
    stage = stage or run.own_stages[0]
    segment = segments(run)[pp_rank]
    every = (
        *_tensor(run, stage, segment),
        *_context(run, stage, segment),
        *_experts(run, stage, segment),
        *_pipeline(run, stage, segment),
        *_step(run, segment),
    )
    return tuple(each for each in every if each.group.size > 1 and each.bytes)


def groups(run: Run) -> dict[GroupName, Group]:
    """The groups of a layout, of one rank too."""
    layout = run.layout
    replicas, experts = layout.dp * layout.cp, layout.etp * layout.ep
    of_a_stage = layout.world_size // layout.pp
    every = (
        Group("tp", layout.tp, 1),
        Group("cp", layout.cp, layout.tp),
        Group("dp", replicas, layout.tp),
        Group("etp", layout.etp, 1),
        Group("ep", layout.ep, layout.etp),
        Group("expert_dp", of_a_stage // experts, experts),
        Group("pp", layout.pp, of_a_stage),
        Group("embedding", 2 if layout.pp > 1 and run.model.mtp_depths else 1, of_a_stage * (layout.pp - 1)),
    )
    return {group.name: group for group in every}


def dispatched_bytes(model: ModelConfig, width_bytes: int) -> tuple[int, int]:
    """What one routed token (one of its top-k copies) sends in dispatch (with its gate) and in combine, forward.

    LatentMoE dispatches ``moe_latent_size`` values instead of ``hidden_size``. The backward pass sends the same again.
    """
    row = (model.moe_latent_size or model.hidden_size) * width_bytes
    return row + PROBABILITY_BYTES, row


def latent_reduction(model: ModelConfig) -> float:
    """How many times smaller the exchanged tokens are than those of a standard MoE of the same hidden size."""
    return model.hidden_size / (model.moe_latent_size or model.hidden_size)


def value_bytes(run: Run) -> int:
    """Bytes of an activation or a parameter."""
    return 2 if run.precision.dtype == "bf16" else 4


def forwards(run: Run, kind: Kind) -> int:
    """Forward passes of a layer in a step: two where it is recomputed whole."""
    parallel = run.parallel
    whole = parallel.recompute == "full" or (
        parallel.recompute == "selective" and kind in ("moe", "mlp") and kind in parallel.recompute_modules
    )
    return 1 + whole


def _sent(operation: Operation, group: Group, buffer: float) -> float:
    share = (group.size - 1) / group.size
    return buffer * (2 * share if operation == "all-reduce" else 1 if operation == "send" else share)


def _tokens(run: Run, stage: Stage) -> int:
    """Tokens of all micro-batches of a step that pass one tensor-parallel group."""
    return stage.num_microbatches * stage.micro_batch_size * stage.seq_length // run.layout.cp


def _tensor(run: Run, stage: Stage, segment: Segment) -> Iterator[Collective]:
    """With sequence parallelism a pair of linears gathers and scatters once each way, and gathers again for wgrad."""
    model, layout, group = run.model, run.layout, groups(run)["tp"]
    whole = _tokens(run, stage) * model.hidden_size * value_bytes(run)
    yield from _projected(run, stage, segment)
    depths = model.mtp_depths * segment.is_last
    passed = [kind for kind in kinds(model, segment) if kind != "moe" or model.moe_shared_expert_intermediate_size]
    forward = sum(forwards(run, kind) for kind in passed)
    tables = segment.is_first + depths
    outputs = (1 + depths) * segment.is_last
    if not layout.sequence_parallel:
        reduced = forward + len(passed) + tables + outputs + 2 * depths
        yield _layer("layers, vocabulary", "all-reduce", group, reduced * whole)
        yield _layer("MTP projection", "all-gather", group, depths * whole)
        return
    # The vocabulary loss keeps its gathered input.
    # MTP's eh_proj: 2 H gathered, H gathered back; backward one H gathered, 2 H gathered for wgrad.
    gathered = forward + 2 * len(passed) + tables + outputs + 6 * depths
    # Its two inputs' gradients are scattered: 2 H.
    scattered = forward + len(passed) + tables + outputs + 2 * depths
    yield _layer("layers, vocabulary", "all-gather", group, gathered * whole)
    yield _layer("layers, vocabulary", "reduce-scatter", group, scattered * whole)


def _projected(run: Run, stage: Stage, segment: Segment) -> Iterator[Collective]:
    """Where ranks are more than key-value groups, the product of linear_qkv is gathered over them, whole."""
    model, group = run.model, groups(run)["tp"]
    if model.num_query_groups < group.size:
        width = (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels
        layers = list(kinds(model, segment)).count("attention")
        whole = layers * _tokens(run, stage) * width * value_bytes(run)
        yield _layer("attention Q, K, V", "all-gather", group, forwards(run, "attention") * whole)
        yield _layer("attention Q, K, V", "reduce-scatter", group, whole)


def _context(run: Run, stage: Stage, segment: Segment) -> Iterator[Collective]:
    """Attention gathers keys and values of the whole sequence; Mamba exchanges sequence for heads.

    Megatron-Core's ``MambaContextParallel`` repeats groups of B and C where a rank would have none of its own.
    """
    model, layout, group = run.model, run.layout, groups(run)["cp"]
    local, width = _tokens(run, stage), value_bytes(run)
    passed = list(kinds(model, segment))
    attention, mamba = passed.count("attention"), passed.count("mamba")
    key_value = 2 * max(model.num_query_groups // layout.tp, 1) * model.kv_channels
    sequence = attention * local * layout.cp * key_value * width
    yield _layer("attention K, V", "all-gather", group, forwards(run, "attention") * sequence)
    yield _layer("attention dK, dV", "all-reduce", group, sequence)
    inner = model.mamba_num_heads * model.mamba_head_dim // layout.tp
    states = 2 * max(model.mamba_num_groups // layout.tp, layout.cp) * model.mamba_state_dim
    channels = 3 * inner + states + model.mamba_num_heads // layout.tp  # z, x, B, C, dt there, y back
    exchanged = mamba * local * channels * width * (forwards(run, "mamba") + 1)
    yield _layer("Mamba sequence to heads and back", "all-to-all", group, exchanged)


def _experts(run: Run, stage: Stage, segment: Segment) -> Iterator[Collective]:
    model, layout, every = run.model, run.layout, groups(run)
    count = list(kinds(model, segment)).count("moe")
    share = layout.tp if layout.sequence_parallel else 1
    tokens = count * _tokens(run, stage) // share
    if gathers_tokens(run):
        yield from _gathered(run, tokens, every["ep"])
        return
    rows = tokens * model.moe_router_topk
    dispatch, combine = dispatched_bytes(model, value_bytes(run))
    directions = forwards(run, "moe") + 1
    copies = model.moe_router_topk if run.parallel.moe_token_dispatcher_type == "flex" else 1
    for what, row in (("expert dispatch", dispatch), ("expert combine", combine)):
        yield replace(_layer(what, "all-to-all", every["ep"], rows * row * directions), copies=copies)
    # Outputs of split experts are summed in the gates' FP32 (``combine_preprocess``).
    summed = dispatched_bytes(model, PROBABILITY_BYTES)[1]
    again, gathered = forwards(run, "moe"), rows * layout.etp
    yield _layer("expert tensor parallel", "all-gather", every["etp"], gathered * (again * dispatch + summed))
    yield _layer("expert tensor parallel", "reduce-scatter", every["etp"], gathered * (again * summed + dispatch))


def _gathered(run: Run, tokens: int, group: Group) -> Iterator[Collective]:
    """Every token goes to every rank and its output comes back summed; each rank receives its experts' gates."""
    model, directions = run.model, forwards(run, "moe") + 1
    whole = directions * tokens * group.size * dispatched_bytes(model, value_bytes(run))[1]
    yield _layer("expert dispatch", "all-gather", group, whole)
    yield _layer("expert combine", "reduce-scatter", group, whole)
    yield _layer("gates", "all-to-all", group, directions * tokens * model.num_moe_experts * PROBABILITY_BYTES)


def _pipeline(run: Run, stage: Stage, segment: Segment) -> Iterator[Collective]:
    """Each chunk hands activations on and gradients back, but for the model's two ends."""
    layout = run.layout
    share = layout.tp if layout.sequence_parallel else 1
    activations = _tokens(run, stage) * run.model.hidden_size * value_bytes(run) // share
    sends = 2 * layout.vpp - segment.is_first - segment.is_last
    yield _layer("activations, gradients", "send", groups(run)["pp"], sends * activations)


def _step(run: Run, segment: Segment) -> Iterator[Collective]:
    """Gradients reduced and parameters gathered over the replicas of dense weights and of experts."""
    every, held = groups(run), weights(run.model, segment, run.layout)
    for group, count in ((every["dp"], held.dense), (every["expert_dp"], held.experts)):
        name = "dense" if group.name == "dp" else "expert"
        if run.parallel.distributed_optimizer:
            yield _once(f"{name} gradients", "reduce-scatter", group, count * GRADIENT_BYTES)
            yield _once(f"{name} parameters", "all-gather", group, count * value_bytes(run))
        else:
            yield _once(f"{name} gradients", "all-reduce", group, count * GRADIENT_BYTES)
    if run.layout.sequence_parallel:  # each rank saw its part of the sequence (finalize_model_grads)
        yield _once("gradients of duplicated weights", "all-reduce", every["tp"], held.duplicated * GRADIENT_BYTES)
    if segment.is_first or segment.is_last:
        table = run.model.vocab_size * run.model.hidden_size // run.layout.tp * GRADIENT_BYTES
        yield _once("embedding of MTP", "all-reduce", every["embedding"], table)


def _layer(what: str, operation: Operation, group: Group, buffer: float) -> Collective:
    sent = _sent(operation, group, buffer)
    return Collective(what=what, operation=operation, group=group, per="layer", bytes=sent)


def _once(what: str, operation: Operation, group: Group, buffer: float) -> Collective:
    sent = _sent(operation, group, buffer)
    return Collective(what=what, operation=operation, group=group, per="step", bytes=sent)
