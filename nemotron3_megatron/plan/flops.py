"""Floating-point operations of training on one token: every GEMM with its planned format, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import prod
from typing import Literal

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.sizes import KINDS, output_flops
from nemotron3_megatron.plan.segments import is_routed
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Format
from nemotron3_megatron.precision.shapes import weight_shape

Pass = Literal["fprop", "dgrad", "wgrad"]
PASSES: tuple[Pass, ...] = ("fprop", "dgrad", "wgrad")


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """Equal operations of the whole model in one direction."""

    kind: str
    """Of the layer (mamba, attention, moe, mlp), or mtp's projection, or output."""
    part: str
    """A role of the precision plan, attention.scores, mamba.scan or output."""
    direction: Pass
    """Of the parts that are no linear, the backward pass counts as dgrad and wgrad: two thirds."""
    format: Format
    calls: int
    """Times a micro-batch passes such a module; MTP's once a depth."""
    flops: int
    """Of all calls, a token; a multiply-add counts 2."""


def work(model: ModelConfig, plan: PrecisionPlan, seq_length: int) -> tuple[Work, ...]:
    """All operations that Megatron-Core counts (it leaves out the router); they sum to ``flops_per_token``."""
    keyed = sorted(plan.rows, key=_key)
    linears = [
        Work(
            kind=role.partition(".")[0],
            part=role,
            direction=direction,
            format=number_format,
            calls=sum(passes(row, model) for row in rows),
            flops=sum(passes(row, model) for row in rows) * linear_flops(rows[0], model),
        )
        for (role, number_format), rows in ((key, list(group)) for key, group in groupby(keyed, _key))
        for direction in PASSES
    ]
    others = [
        Work(kind=kind, part=part, direction=direction, format="bf16", calls=calls, flops=calls * flops)
        for kind, part, calls, flops in _others(model, seq_length)
        if calls
        for direction in PASSES
    ]
    return (*linears, *others)


def work_of(run: Run) -> tuple[Work, ...]:
    """:func:`work` of a run's first stage."""
    return work(run.model, run.precision_plan, run.own_stages[0].seq_length)


def passes(row: PlanRow, model: ModelConfig) -> int:
    """How often a micro-batch goes through a module: once a depth through a shared MTP block."""
    return model.mtp_depths if row.block == "mtp" and model.mtp_use_repeated_layer else 1


def linear_flops(row: PlanRow, model: ModelConfig) -> int:
    """Of one GEMM of a module for one token: the top-k of its experts."""
    times = model.moe_router_topk if is_routed(row.role) else 1
    return 2 * times * prod(weight_shape(row.role, model))


def scan_flops(model: ModelConfig) -> int:
    """Forward operations of one Mamba scan for one token (Megatron-Core's count)."""
    return 7 * model.mamba_num_heads * model.mamba_head_dim * model.mamba_state_dim


def score_flops(model: ModelConfig, seq_length: int) -> int:
    """Forward operations of causal attention for one token: half of the square, two products."""
    return 2 * seq_length * model.num_attention_heads * model.kv_channels


def _key(row: PlanRow) -> tuple[str, Format]:
    return row.role, row.format


def _others(model: ModelConfig, seq_length: int) -> tuple[tuple[str, str, int, int], ...]:
    """Kind, part, calls and forward operations of one call."""
    passed = [KINDS[symbol] for symbol in model.pattern + model.mtp_pattern * model.mtp_depths]
    return (
        ("mamba", "mamba.scan", passed.count("mamba"), scan_flops(model)),
        ("attention", "attention.scores", passed.count("attention"), score_flops(model, seq_length)),
        ("output", "output", 1 + model.mtp_depths, output_flops(model)),
    )
