"""How much of a model is in which format: parameters, and operations of the forward pass."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.sizes import output_flops
from nemotron3_megatron.plan.counts import count_parameters, flops_per_token
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Format
from nemotron3_megatron.precision.shapes import weight_shape

FORMATS: tuple[Format, ...] = ("nvfp4", "mxfp8", "bf16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Share:
    """A part of the model."""

    part: str
    """A format, or what no policy decides."""
    modules: int
    """Rows of the plan; 0 outside the policy."""
    parameters: int
    flops: int
    """Of the forward pass of one token."""


def format_shares(plan: PrecisionPlan, model: ModelConfig, seq_length: int) -> tuple[Share, ...]:
    """The parts, which sum to all parameters (MTP's too) and to a third of ``flops_per_token``.

    Megatron-Core's count of operations, which this follows, leaves out the router.
    """
    used = [name for name in FORMATS if any(row.format == name for row in plan.rows)]
    shares = [_share([row for row in plan.rows if row.format == name], name, model) for name in used]
    passes = 1 + model.mtp_depths
    ends = Share(
        part="embedding, output layer",
        modules=0,
        parameters=2 * model.vocab_size * model.hidden_size,
        flops=passes * output_flops(model),
    )
    counts = count_parameters(model)
    rest = Share(
        part="router, norms, attention scores, Mamba scan",
        modules=0,
        parameters=counts.total + counts.mtp - sum(share.parameters for share in (*shares, ends)),
        flops=flops_per_token(model, seq_length) // 3 - sum(share.flops for share in (*shares, ends)),
    )
    return (*shares, ends, rest)


def _share(rows: list[PlanRow], name: str, model: ModelConfig) -> Share:
    weights = [prod(weight_shape(row.role, model)) for row in rows]
    experts = [row.role.startswith("moe.experts") for row in rows]
    repeats = [model.mtp_depths if row.block == "mtp" and model.mtp_use_repeated_layer else 1 for row in rows]
    held = (size * (model.num_moe_experts if routed else 1) for size, routed in zip(weights, experts, strict=True))
    passed = (size * (model.moe_router_topk if routed else 1) for size, routed in zip(weights, experts, strict=True))
    return Share(
        part=name,
        modules=len(rows),
        parameters=sum(held),
        flops=2 * sum(size * times for size, times in zip(passed, repeats, strict=True)),
    )
