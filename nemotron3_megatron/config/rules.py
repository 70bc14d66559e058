"""The rules of what can run: model and layout. Those of stages, and ``RULES`` itself, are in ``stage_rules``.

Where a rule is Megatron-Core's own (0.19.2) its file is named; the others are ours. A rule may assume that the
rules before it in ``RULES`` hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.sizes import KINDS

RECOMPUTABLE = ("core_attn", "layernorm", "mlp", "moe", "moe_act", "shared_experts")
"""Megatron-Core ``transformer_config.py`` ``allowed_modules``, those that a Nemotron 3 model has."""


@dataclass(frozen=True, slots=True)
class Violation:
    """Values that cannot be together, and why."""

    keys: tuple[str, ...]
    why: str
    hint: str | None = None
    """What to write, when no nearby integer helps."""


def data_parallel_size(recipe: Recipe, world_size: int) -> int:
    """Copies of the model in the world."""
    return world_size // (recipe.parallel.tp * recipe.parallel.pp * recipe.parallel.cp)


def sequence_parallel(recipe: Recipe) -> bool:
    """Whether activations between blocks are split along the sequence; on with tp > 1 unless set."""
    chosen = recipe.parallel.sequence_parallel
    return recipe.parallel.tp > 1 if chosen is None else chosen


Rule = Callable[[Recipe, int], Iterator[Violation]]


def pattern(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Layer symbols, and what each kind of layer needs."""
    model = recipe.model
    for key, text in {"model.pattern": model.pattern, "model.mtp_pattern": model.mtp_pattern}.items():
        wrong = sorted(set(text) - set(KINDS))
        if wrong:
            legal = "".join(symbol for symbol in text if symbol in KINDS)
            why = f"has {' '.join(wrong)}; the symbols are M Mamba-2, * attention, E mixture of experts, - MLP"
            extra = {"|": "; pipeline cuts come from parallel.pp and vpp", "/": "; MTP has model.mtp_pattern"}
            yield Violation((key,), why + "".join(extra.get(symbol, "") for symbol in wrong), f"{key}='{legal}'")
    if not model.pattern:
        yield Violation(("model.pattern",), "a model has at least one layer", "model.pattern='MEM*E'")
    if model.mtp_depths and not model.mtp_pattern:
        yield Violation(
            ("model.mtp_depths",),
            "model.mtp_pattern is empty, so there is nothing to repeat",
            "model.mtp_pattern='*E' or model.mtp_depths=0",
        )
    if model.mtp_pattern and not model.mtp_depths:
        yield Violation(
            ("model.mtp_pattern",),
            "model.mtp_depths is 0, so these layers would not exist",
            "model.mtp_depths=2 or model.mtp_pattern=''",
        )
    if "-" in _all_layers(recipe) and model.ffn_hidden_size is None:
        yield Violation(
            ("model.ffn_hidden_size",),
            "the pattern has an MLP layer (-), whose width is not set",
            f"model.ffn_hidden_size={4 * model.hidden_size}",
        )


def experts(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Mixture of experts (Megatron-Core ``moe_layer.py``, ``token_dispatcher.py``)."""
    model, parallel = recipe.model, recipe.parallel
    if "E" not in _all_layers(recipe):
        for name in ("ep", "etp"):
            if getattr(parallel, name) > 1:
                yield Violation((f"parallel.{name}",), "the pattern has no mixture-of-experts layer (E)")
        return
    if model.moe_router_topk > model.num_moe_experts:
        yield Violation(
            ("model.moe_router_topk", "model.num_moe_experts"),
            f"a token cannot go to {model.moe_router_topk} of {model.num_moe_experts} experts",
        )
    if model.moe_latent_size is not None and model.moe_latent_size >= model.hidden_size:
        yield Violation(
            ("model.moe_latent_size",), f"must be below hidden_size={model.hidden_size}; null works in hidden_size"
        )
    if model.num_moe_experts % parallel.ep:
        yield Violation(
            ("parallel.ep", "model.num_moe_experts"),
            f"{model.num_moe_experts} experts cannot be spread evenly over {parallel.ep} ranks",
        )
    if model.moe_ffn_hidden_size % parallel.etp:
        yield Violation(
            ("parallel.etp", "model.moe_ffn_hidden_size"),
            f"an expert of width {model.moe_ffn_hidden_size} cannot be split {parallel.etp} ways",
        )
    if model.moe_router_fusion and (recipe.device == "cpu" or model.spec == "torch"):
        yield Violation(
            ("model.moe_router_fusion",),
            "the kernels are Transformer Engine's, for CUDA and model.spec=te",
            "model.moe_router_fusion=false",
        )
    if parallel.moe_token_dispatcher_type == "flex" and (parallel.tp * parallel.ep == 1 or recipe.device == "cpu"):
        yield Violation(
            ("parallel.moe_token_dispatcher_type",),
            "flex needs CUDA and tp*ep > 1",
            "parallel.moe_token_dispatcher_type=alltoall",
        )
    if parallel.moe_token_dispatcher_type == "allgather" and parallel.etp > 1:
        yield Violation(
            ("parallel.moe_token_dispatcher_type", "parallel.etp"),
            "allgather gathers over the ranks that hold whole experts",
            "parallel.etp=1, or parallel.moe_token_dispatcher_type=alltoall",
        )


def tensor_parallel(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Widths against tp (Megatron-Core ``transformer_config.py``, ``attention.py``, ``moe_layer.py``)."""
    model, parallel = recipe.model, recipe.parallel
    tp = parallel.tp
    if model.num_attention_heads % model.num_query_groups:
        yield Violation(
            ("model.num_query_groups", "model.num_attention_heads"),
            f"{model.num_attention_heads} query heads cannot share {model.num_query_groups} KV heads",
        )
    widths = {"model.num_attention_heads": model.num_attention_heads, "model.vocab_size": model.vocab_size}
    layers = _all_layers(recipe)
    if "E" in layers and model.moe_shared_expert_intermediate_size is not None:
        widths["model.moe_shared_expert_intermediate_size"] = model.moe_shared_expert_intermediate_size
    if "-" in layers and model.ffn_hidden_size is not None:
        widths["model.ffn_hidden_size"] = model.ffn_hidden_size
    for key, width in widths.items():
        if width % tp:
            yield Violation(("parallel.tp", key), f"{key}={width} cannot be split {tp} ways")
    groups = model.num_query_groups
    if groups % tp and tp % groups:
        why = f"{groups} KV heads can be neither split nor replicated evenly over tp={tp}"
        yield Violation(("parallel.tp", "model.num_query_groups"), why)
    if parallel.sequence_parallel and tp == 1:
        yield Violation(
            ("parallel.sequence_parallel",),
            "is a part of tensor parallelism and needs tp > 1",
            "parallel.sequence_parallel=null or parallel.tp=2",
        )
    if parallel.sequence_parallel is False and tp > 1 and "E" in layers:
        yield Violation(
            ("parallel.sequence_parallel",),
            "mixture of experts with tp > 1 needs it",
            "parallel.sequence_parallel=true or parallel.tp=1",
        )


def mamba(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Mamba heads and groups against tp and cp (Megatron-Core ``mamba_mixer.py``, ``mamba_context_parallel.py``)."""
    model, parallel = recipe.model, recipe.parallel
    heads, groups, tp, cp = model.mamba_num_heads, model.mamba_num_groups, parallel.tp, parallel.cp
    if "M" not in _all_layers(recipe):
        return
    if heads % groups:
        yield Violation(
            ("model.mamba_num_groups", "model.mamba_num_heads"),
            f"{heads} Mamba heads cannot be divided into {groups} groups",
        )
    if groups % tp:
        yield Violation(("parallel.tp", "model.mamba_num_groups"), f"{groups} Mamba groups cannot be split {tp} ways")
    if heads % (tp * cp):
        yield Violation(
            ("parallel.cp", "parallel.tp", "model.mamba_num_heads"),
            f"{heads} Mamba heads cannot be spread over tp*cp = {tp * cp} ranks",
        )
    local = max(groups // tp, 1)
    if local % cp and cp % local:
        why = f"the {local} Mamba groups of a tp rank can be neither split nor replicated evenly over cp={cp}"
        yield Violation(("parallel.cp", "model.mamba_num_groups"), why)


def world(recipe: Recipe, world_size: int) -> Iterator[Violation]:
    """The world against the layout (Megatron-Core ``parallel_state.py``)."""
    parallel = recipe.parallel
    dense = parallel.tp * parallel.pp * parallel.cp
    if world_size % dense:
        why = f"one model takes tp*pp*cp = {parallel.tp}*{parallel.pp}*{parallel.cp} = {dense} ranks"
        keys = tuple(f"parallel.{name}" for name in ("tp", "pp", "cp") if getattr(parallel, name) > 1)
        yield Violation((*keys, "world_size"), f"{why}, and the world has {world_size}")
    expert = parallel.etp * parallel.ep * parallel.pp
    if world_size % expert:
        why = f"one set of experts takes etp*ep*pp = {parallel.etp}*{parallel.ep}*{parallel.pp} = {expert} ranks"
        keys = tuple(f"parallel.{name}" for name in ("ep", "etp", "pp") if getattr(parallel, name) > 1)
        yield Violation((*keys, "world_size"), f"{why}, and the world has {world_size}")


def pipeline(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Layers against pipeline segments (Megatron-Core ``hybrid_layer_allocation.py``)."""
    parallel, layers = recipe.parallel, len(recipe.model.pattern)
    if parallel.vpp > 1 and parallel.pp == 1:
        yield Violation(
            ("parallel.vpp",), "interleaving needs more than one pipeline stage", "parallel.vpp=1 or parallel.pp=2"
        )
    if parallel.pp * parallel.vpp > layers:
        why = f"{layers} layers cannot fill pp*vpp = {parallel.pp * parallel.vpp} segments"
        yield Violation(("parallel.pp", "parallel.vpp"), why)


def options(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Options that would have no effect, or that Megatron-Core refuses."""
    parallel = recipe.parallel
    if parallel.overlap_param_gather and not (parallel.distributed_optimizer and parallel.overlap_grad_reduce):
        yield Violation(
            ("parallel.overlap_param_gather",),
            "needs distributed_optimizer and overlap_grad_reduce",
            "parallel.overlap_grad_reduce=true parallel.distributed_optimizer=true",
        )
    if parallel.recompute_modules and parallel.recompute != "selective":
        yield Violation(
            ("parallel.recompute_modules",),
            f"has no effect with recompute={parallel.recompute}",
            "parallel.recompute=selective",
        )
    for module in parallel.recompute_modules:
        if module not in RECOMPUTABLE:
            yield Violation(
                ("parallel.recompute_modules",),
                f"{module} is none of {', '.join(RECOMPUTABLE)}",
                f"parallel.recompute_modules=[{RECOMPUTABLE[0]}]",
            )
    if parallel.recompute == "selective" and not parallel.recompute_modules:
        yield Violation(
            ("parallel.recompute",),
            "selective recomputation names its modules",
            "parallel.recompute_modules=[core_attn]",
        )
    if not 0 <= recipe.data.eod_token < recipe.model.vocab_size:
        why = f"is not a token of the vocabulary, which has 0 to {recipe.model.vocab_size - 1}"
        yield Violation(("data.eod_token", "model.vocab_size"), why, "the eod_token of the data's manifest.json")
    for group in ("sources", "validation"):
        for name, source in getattr(recipe.data, group).items():
            if source.weight <= 0:
                yield Violation((f"data.{group}.{name}.weight",), "must be positive", f"~data.{group}.{name}")
            if source.max_epochs is not None and source.max_epochs <= 0:
                yield Violation((f"data.{group}.{name}.max_epochs",), "must be positive", f"~data.{group}.{name}")
            if source.isolate_documents and not recipe.data.isolate_documents:
                why = "the model isolates no documents unless data.isolate_documents=true"
                yield Violation((f"data.{group}.{name}.isolate_documents",), why, "data.isolate_documents=true")


def _all_layers(recipe: Recipe) -> str:
    return recipe.model.pattern + recipe.model.mtp_pattern
