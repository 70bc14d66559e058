"""Widths of a plan's linears on one rank, and whether their formats' blocks fit them."""

from __future__ import annotations

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Format, Role

MULTIPLE: dict[Format, int] = {"nvfp4": 16, "mxfp8": 32}
"""What both widths of a linear divide by: a block, along the reduction of fprop (inputs) and of dgrad (outputs)."""


def weight_shape(role: Role, model: ModelConfig, tp: int = 1, etp: int = 1) -> tuple[int, int]:
    """Outputs and inputs of a role's linear on one rank, of one expert where there are many.

    Megatron-Core splits outputs of the first linear of a pair and inputs of the second; latent projections are whole
    on every rank. Keys and values are split even where ranks are more than key-value groups (their product is gathered
    then, core/transformer/attention.py ``get_query_key_value_tensors``).
    """
    hidden, routed = model.hidden_size, model.moe_latent_size or model.hidden_size
    inner = model.mamba_num_heads * model.mamba_head_dim
    states = 2 * model.mamba_num_groups * model.mamba_state_dim
    query = model.num_attention_heads * model.kv_channels
    key_value = 2 * model.num_query_groups * model.kv_channels
    shared = model.moe_shared_expert_intermediate_size or 0
    ffn = model.ffn_hidden_size or 0
    shapes: dict[Role, tuple[int, int]] = {
        "attention.qkv": ((query + key_value) // tp, hidden),
        "attention.proj": (hidden, query // tp),
        "mamba.in_proj": ((2 * inner + states + model.mamba_num_heads) // tp, hidden),
        "mamba.out_proj": (hidden, inner // tp),
        "moe.latent_down": (routed, hidden),
        "moe.latent_up": (hidden, routed),
        "moe.experts.fc1": (model.moe_ffn_hidden_size // etp, routed),
        "moe.experts.fc2": (routed, model.moe_ffn_hidden_size // etp),
        "moe.shared.fc1": (shared // tp, hidden),
        "moe.shared.fc2": (hidden, shared // tp),
        "mlp.fc1": (ffn // tp, hidden),
        "mlp.fc2": (hidden, ffn // tp),
        "mtp.eh_proj": (hidden // tp, 2 * hidden),
    }
    return shapes[role]


def check_shapes(plan: PrecisionPlan, model: ModelConfig, tp: int = 1, etp: int = 1) -> None:
    """Refuse a module whose width is not a whole number of blocks.

    Raises:
        UserError: naming the module, its width, the width nearest to it that would do, and the rule that would
            leave it out.
    """
    for row in plan.rows:
        multiple = MULTIPLE.get(row.format)
        shape = weight_shape(row.role, model, tp, etp)
        if multiple is not None and any(width % multiple for width in shape):
            raise _misfit(row, shape, multiple, tp, etp)


def _misfit(row: PlanRow, shape: tuple[int, int], multiple: int, tp: int, etp: int) -> UserError:
    side, width = next((s, w) for s, w in zip(("outputs", "inputs"), shape, strict=True) if w % multiple)
    ranks, name = (etp, "etp") if row.role.startswith("moe.experts") else (tp, "tp")
    split = f" on each of {ranks} ranks (parallel.{name})" if ranks > 1 else ""
    near = max(multiple, (width + multiple // 2) // multiple * multiple)
    return UserError(
        f"{row.module} in {row.format} (rule: {row.rule})",
        why=f"has {width} {side}{split}, and {row.format} needs a multiple of {multiple}",
        nearest=f"{near} {side}, or a rule {{role: {row.role}, format: bf16}}",
    )
