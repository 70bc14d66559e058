"""Seconds of computation and communication: peaks and bandwidths times the share of them that is reached."""

from __future__ import annotations

from math import prod

from nemotron3_megatron.accelerators import Gpu
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.config.sizes import Kind
from nemotron3_megatron.plan.communication import Collective, Group, forwards, value_bytes
from nemotron3_megatron.plan.flops import passes, scan_flops, score_flops
from nemotron3_megatron.plan.segments import Segment, is_routed, kinds, weights
from nemotron3_megatron.precision.plan import PlanRow
from nemotron3_megatron.precision.policy import Format
from nemotron3_megatron.precision.shapes import weight_shape

# Fitted together to the published throughputs (``plan.published``); docs/planning.md says how, and shows what error
# remains. One of them alone is no measurement of what its name says.
GEMM_EFFICIENCY: dict[Format, float] = {"bf16": 0.70, "mxfp8": 0.58, "nvfp4": 0.25}
"""Share of a format's dense peak that GEMMs reach; NVFP4's also bears Hadamard transforms and stochastic rounding."""
ATTENTION_EFFICIENCY = 0.5
"""Share of the BF16 peak that causal attention reaches (not fitted: 1 % of these models' operations)."""
SCAN_EFFICIENCY = 0.15
"""Share of the BF16 peak that Mamba's chunked scan reaches on the operations that Megatron-Core counts (not fitted)."""
MEMORY_EFFICIENCY = 0.40
"""Share of the memory bandwidth that everything but GEMMs reaches."""
NVLINK_EFFICIENCY = 0.40
NETWORK_EFFICIENCY = 0.60
"""Shares of the bandwidth that collectives reach, waiting for the slowest rank included."""
HIDDEN_SHARE = 0.9
"""Share of the step's gradient and parameter traffic that runs beside computation, where the recipe overlaps it (not
fitted: the published runs have few replicas)."""
LAYER_SECONDS = 600e-6
"""Launches, small kernels and waiting for routing in each layer of each micro-batch, forward and backward."""

_WIDTH: dict[Format, float] = {"bf16": 2, "mxfp8": 1 + 1 / 32, "nvfp4": 0.5 + 1 / 16}
"""Bytes of a value with its share of the scale."""
ADAM_BYTES = 38
"""Of an optimizer shard's parameter: gradient read twice (norm, Adam), master and two moments read and written, BF16
written; 4 + 4 + 3 * 8 + 2, and 4 for the gradient's own zero."""


KIND_OF: dict[str, Kind] = {"moe": "moe", "mlp": "mlp"}
"""Kinds of layers that may be recomputed by themselves."""


def gemm_seconds(run: Run, gpu: Gpu, stage: Stage, row: PlanRow) -> float:
    """Forward, dgrad and wgrad of one module on one micro-batch and rank, quantising included.

    Each GEMM takes its operations at the format's peak or its operands' memory traffic, whichever is longer.
    """
    model, layout = run.model, run.layout
    outputs, inputs = weight_shape(row.role, model, layout.tp, layout.etp)
    tokens: float = stage.micro_batch_size * stage.seq_length / layout.cp
    held = 1
    if is_routed(row.role):
        tokens *= model.moe_router_topk * layout.etp / (layout.tp if layout.sequence_parallel else 1)
        held = model.num_moe_experts // layout.ep
    elif row.role.startswith("moe.latent") and layout.sequence_parallel:
        tokens /= layout.tp  # whole weights, a part of the sequence
    number_format = row.format if gpu.is_native(row.format) else "bf16"
    width = _WIDTH[number_format]
    sizes = (tokens * inputs, tokens * outputs, held * inputs * outputs)
    flops = 2 * tokens * inputs * outputs
    traffic = sum(sizes) * width
    memory = gpu.memory_bandwidth * MEMORY_EFFICIENCY
    rate = gpu.peak(row.format) * GEMM_EFFICIENCY[number_format]
    kind = row.role.partition(".")[0]
    again = forwards(run, KIND_OF.get(kind, "mamba"))
    seconds = (2 + again) * max(flops / rate, traffic / memory)
    return seconds + _quantising_bytes(row.format, gpu, tokens * (inputs + outputs)) / memory


def other_seconds(run: Run, gpu: Gpu, stage: Stage, segment: Segment) -> float:
    """Everything of a micro-batch on this rank that is no planned linear, forward and backward."""
    model, layout = run.model, run.layout
    tokens = stage.micro_batch_size * stage.seq_length / layout.cp
    passed = list(kinds(model, segment))
    depths = (1 + model.mtp_depths) * segment.is_last
    output = 3 * 2 * model.hidden_size * model.vocab_size / layout.tp / (gpu.bf16 * GEMM_EFFICIENCY["bf16"])
    scores = 3.5 * score_flops(model, stage.seq_length) / layout.tp / (gpu.bf16 * ATTENTION_EFFICIENCY)  # 2.5 backward
    scan = 3 * scan_flops(model) / layout.tp / (gpu.bf16 * SCAN_EFFICIENCY)
    computed = depths * output + passed.count("attention") * scores + passed.count("mamba") * scan
    logits = depths * 4 * 2 * model.vocab_size / layout.tp  # written, read, their gradient written, read
    moved = logits + sum(_moved_bytes(model, kind, layout.tp, value_bytes(run)) for kind in passed)
    again = sum(forwards(run, kind) - 1 for kind in passed) / max(len(passed), 1) / 3
    seconds = tokens * (computed + moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)) * (1 + again)
    return seconds + len(passed) * LAYER_SECONDS


def optimizer_seconds(run: Run, gpu: Gpu, segment: Segment) -> float:
    """Gradient norm and Adam over this rank's shard, quantised copies of the weights, gradients zeroed."""
    model, layout = run.model, run.layout
    held = weights(model, segment, layout)
    replicas = layout.dp * layout.cp
    expert_replicas = layout.world_size // layout.pp // (layout.ep * layout.etp)
    sharded = run.parallel.distributed_optimizer
    shard = held.dense / replicas + held.experts / expert_replicas if sharded else held.dense + held.experts
    moved = ADAM_BYTES * shard + 4 * (held.dense + held.experts)
    for row in held_rows(run, segment):
        if row.format == "bf16":
            continue
        experts = model.num_moe_experts // layout.ep if is_routed(row.role) else 1
        size = experts * prod(weight_shape(row.role, model, layout.tp, layout.etp))
        moved += _quantising_bytes(row.format, gpu, size)
    return moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)


def collective_seconds(collective: Collective, gpu: Gpu) -> float:
    """By where the group lies: inside an NVLink domain, or across the network.

    A ring over domains crosses the network once a domain, over the links of all members there; an all-to-all
    reaches other domains over the rank's own link (a hierarchical dispatcher once a domain) and members over NVLink.
    """
    group, sent = collective.group, collective.bytes
    nvlink, network = gpu.nvlink_bandwidth * NVLINK_EFFICIENCY, gpu.network_bandwidth * NETWORK_EFFICIENCY
    near = members_in_domain(group, gpu)
    if near == group.size:
        return sent / nvlink
    if collective.operation == "send":
        return sent / network
    if collective.operation == "all-to-all":
        outside = (group.size - near) / (group.size - 1)
        sent_far = outside * sent * _distinct(collective.copies, group.size / near)
        return max(sent_far / network, sent / nvlink)
    return max(sent / (network * near), sent / nvlink)


def members_in_domain(group: Group, gpu: Gpu) -> int:
    """Ranks of the group in one NVLink domain, when ranks fill domains in order."""
    return max(1, min(group.size, gpu.nvlink_domain // group.stride))


def _distinct(copies: int, domains: float) -> float:
    """Share of a row's copies left when each domain gets one: domains that ``copies`` random choices meet, a copy."""
    return domains * (1 - (1 - 1 / domains) ** copies) / copies


def held_rows(run: Run, segment: Segment) -> list[PlanRow]:
    """Rows of the precision plan on this pipeline rank."""
    plan = run.precision_plan
    return [row for row in plan.rows if (segment.is_last if row.layer is None else row.layer in segment.layers)]


def linear_seconds(run: Run, gpu: Gpu, stage: Stage, segment: Segment) -> float:
    """All planned linears of one micro-batch on this rank; MTP's once a depth."""
    rows = held_rows(run, segment)
    once = {(row.role, row.format): row for row in rows}
    seconds = {key: gemm_seconds(run, gpu, stage, row) for key, row in once.items()}
    return sum(passes(row, run.model) * seconds[row.role, row.format] for row in rows)


def _quantising_bytes(number_format: Format, gpu: Gpu, values: float) -> float:
    """Of quantising for both directions: values read, two copies written; emulated: read and written twice in BF16."""
    if number_format == "bf16":
        return 0
    return values * (2 + 2 * _WIDTH[number_format] if gpu.is_native(number_format) else 8)


def _moved_bytes(model: ModelConfig, kind: Kind, tp: int, width: int) -> float:
    """Memory traffic of one layer for one token beside its GEMMs, forward and backward: values read or written.

    norm and residual: 4 forward, 6 backward. Mamba: convolution, scan and gated norm read and write its inner
    channels 6 times forward, twice that backward. MoE: sorting for dispatch and for the experts, and back, 8 times each
    way; activations of experts 2 and 3. Router: scores in FP32, about 10.
    """
    values: float = 10 * model.hidden_size
    if kind == "mamba":
        inner = model.mamba_num_heads * model.mamba_head_dim
        values += 18 * (2 * inner + 2 * model.mamba_num_groups * model.mamba_state_dim)
    elif kind == "attention":
        values += 10 * (model.num_attention_heads + model.num_query_groups) * model.kv_channels
    elif kind == "mlp":
        values += 5 * (model.ffn_hidden_size or 0)
    else:
        topk = model.moe_router_topk
        values += topk * (16 * (model.moe_latent_size or model.hidden_size) + 5 * model.moe_ffn_hidden_size)
        values += 5 * (model.moe_shared_expert_intermediate_size or 0) + 20 * model.num_moe_experts
    return values * width / tp
