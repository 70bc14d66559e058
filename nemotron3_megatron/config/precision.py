"""What a precision plan demands of widths, batches and backend: rules that come after those of ``rules.py``."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import Rule, Violation, sequence_parallel
from nemotron3_megatron.config.schedule import lengths
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Role
from nemotron3_megatron.precision.shapes import MULTIPLE, check_shapes, weight_shape

_HIDDEN = ("model.hidden_size",)
_QUERY = ("model.num_attention_heads", "model.kv_channels", "parallel.tp")
_INNER = ("model.mamba_num_heads", "model.mamba_head_dim", "parallel.tp")
_EXPERT = ("model.moe_ffn_hidden_size", "parallel.etp")
_SHARED = ("model.moe_shared_expert_intermediate_size", "parallel.tp")
_LATENT = ("model.moe_latent_size",)
_FFN = ("model.ffn_hidden_size", "parallel.tp")

_KEYS: dict[Role, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "attention.qkv": ((*_QUERY, "model.num_query_groups"), _HIDDEN),
    "attention.proj": (_HIDDEN, _QUERY),
    "mamba.in_proj": ((*_INNER, "model.mamba_num_groups", "model.mamba_state_dim"), _HIDDEN),
    "mamba.out_proj": (_HIDDEN, _INNER),
    "moe.latent_down": (_LATENT, _HIDDEN),
    "moe.latent_up": (_HIDDEN, _LATENT),
    "moe.experts.fc1": (_EXPERT, _LATENT),
    "moe.experts.fc2": (_LATENT, _EXPERT),
    "moe.shared.fc1": (_SHARED, _HIDDEN),
    "moe.shared.fc2": (_HIDDEN, _SHARED),
    "mlp.fc1": (_FFN, _HIDDEN),
    "mlp.fc2": (_HIDDEN, _FFN),
    "mtp.eh_proj": ((*_HIDDEN, "parallel.tp"), _HIDDEN),
}
"""What the outputs and the inputs of a role's linear on one rank follow from (``precision.shapes.weight_shape``)."""


def precision_rules(plan: PrecisionPlan) -> tuple[Rule, ...]:
    """The rules for recipes whose policy gives ``plan``; they hold while neither policy nor layers change."""
    return (partial(_widths, plan), partial(_tokens, plan), partial(_backend, plan))


def _widths(plan: PrecisionPlan, recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Both widths of every quantised linear are whole blocks on each rank."""
    parallel = recipe.parallel
    for row in {(row.role, row.format): row for row in reversed(plan.rows)}.values():
        try:
            check_shapes(PrecisionPlan((row,)), recipe.model, parallel.tp, parallel.etp)
        except UserError as error:
            leave = f"a rule {{role: {row.role}, format: bf16}} would leave it out"
            yield Violation(_width_keys(row, recipe), f"{error.what} {error.why}; {leave}", error.nearest)


def _width_keys(row: PlanRow, recipe: Recipe) -> tuple[str, ...]:
    shape = weight_shape(row.role, recipe.model, recipe.parallel.tp, recipe.parallel.etp)
    outputs, inputs = _KEYS[row.role]
    keys = outputs if shape[0] % MULTIPLE[row.format] else inputs
    routed = _HIDDEN if recipe.model.moe_latent_size is None else _LATENT
    keys = routed if keys == _LATENT else keys
    return tuple(key for key in keys if not key.startswith("parallel.") or _is_split(key, recipe))


def _tokens(plan: PrecisionPlan, recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """The tokens of a micro-batch on a rank, wgrad's reduction, are whole blocks; those of experts are padded.

    Under sequence parallelism a shard is quantised before it is gathered, so the shard counts.
    """
    formats = {row.format for row in plan.rows if not row.role.startswith("moe.experts")}
    needed = [(MULTIPLE[name], name) for name in formats if name in MULTIPLE]
    if not needed:
        return
    block, name = max(needed)  # blocks of 32 are also whole blocks of 16
    parallel = recipe.parallel
    split = ["parallel.cp", "parallel.tp"] if sequence_parallel(recipe) else ["parallel.cp"]
    ranks = parallel.cp * (parallel.tp if sequence_parallel(recipe) else 1)
    found = [
        (f"stages.{stage}.other_lengths.{name}" if name else f"stages.{stage}", length)
        for stage, config in recipe.stages.items()
        for name, length in lengths(config, 1).items()
    ]
    for place, length in found:
        count = length.seq_length * length.micro_batch_size // ranks
        if count % block:
            keys = (f"{place}.seq_length", f"{place}.micro_batch_size")
            yield Violation(
                (*keys, *(key for key in split if _is_split(key, recipe))),
                f"a micro-batch has {count} tokens on a rank, no whole number of {name}'s blocks of {block},"
                " into which wgrad divides tokens",
            )


def _backend(plan: PrecisionPlan, recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """A backend is chosen where something is quantised, and native only where Transformer Engine computes."""
    precision = recipe.precision
    if precision.backend == "auto":
        return
    if not any(row.format in MULTIPLE for row in plan.rows):
        why = f"the policy {precision.name} quantises nothing, so there is no backend to choose"
        yield Violation(("precision.backend",), why, "precision.backend=auto")
    if precision.backend != "native":
        return
    for key, needed, wrong, why in (
        ("precision.dtype", "bf16", precision.dtype == "fp32", "native kernels quantise BF16, not FP32"),
        ("device", "cuda", recipe.device == "cpu", "native kernels are a GPU's"),
        ("model.spec", "te", recipe.model.spec == "torch", "native kernels are Transformer Engine's"),
    ):
        if wrong:
            yield Violation(("precision.backend", key), why, f"precision.backend=emulated or {key}={needed}")


def _is_split(key: str, recipe: Recipe) -> bool:
    ranks: int = getattr(recipe.parallel, key.removeprefix("parallel."))
    return ranks > 1
