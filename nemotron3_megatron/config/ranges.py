"""The rules of single numbers: each is sensible alone."""

from __future__ import annotations

from collections.abc import Iterator

from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import Violation


def ranges(recipe: Recipe, world_size: int) -> Iterator[Violation]:
    """Each number alone is sensible."""
    if world_size < 1:
        yield Violation(("world_size",), "a run has at least one rank")
    if recipe.seed >= 2**63:  # torch's generators take 64 bits, and each rank's seed is its own distance further
        yield Violation(("seed",), "must be below 2^63", "seed=1234")
    if not recipe.name:
        yield Violation(("name",), "is empty, and names the run", "name=NAME, or none: that of the recipe's file")
    sizes = {
        "model": (
            "hidden_size",
            "vocab_size",
            "num_attention_heads",
            "num_query_groups",
            "kv_channels",
            "mamba_num_heads",
            "mamba_head_dim",
            "mamba_state_dim",
            "mamba_num_groups",
            "mamba_chunk_size",
            "num_moe_experts",
            "moe_router_topk",
            "moe_ffn_hidden_size",
        ),
        "parallel": ("tp", "pp", "vpp", "cp", "ep", "etp"),
        "telemetry": ("eval_batches",),
    }
    for group, names in sizes.items():
        for name in names:
            if getattr(getattr(recipe, group), name) < 1:
                yield Violation((f"{group}.{name}",), "must be at least 1")
    optional = {
        "model.ffn_hidden_size": recipe.model.ffn_hidden_size,
        "model.moe_shared_expert_intermediate_size": recipe.model.moe_shared_expert_intermediate_size,
        "model.moe_latent_size": recipe.model.moe_latent_size,
        "checkpoint.keep_last": recipe.checkpoint.keep_last,
        "max_steps": recipe.max_steps,
    }
    for key, value in optional.items():
        if value is not None and value < 1:
            yield Violation((key,), "must be at least 1, or null")
    for key, value in {
        "seed": recipe.seed,
        "model.mtp_depths": recipe.model.mtp_depths,
        "data.num_prefetch": recipe.data.num_prefetch,
        "checkpoint.keep_best": recipe.checkpoint.keep_best,
    }.items():
        if value < 0:
            yield Violation((key,), "must not be negative")


def real_numbers(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Learning rate, betas, weights and the like."""
    optimizer, model = recipe.optimizer, recipe.model
    if optimizer.lr <= 0:
        yield Violation(("optimizer.lr",), "must be positive", "optimizer.lr=1e-3")
    if not 0 <= optimizer.min_lr <= optimizer.lr:
        why = f"must be between 0 and optimizer.lr={optimizer.lr}"
        yield Violation(("optimizer.min_lr", "optimizer.lr"), why, f"optimizer.min_lr={optimizer.lr / 100:g}")
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(optimizer, name) < 1:
            yield Violation((f"optimizer.{name}",), "must be in [0, 1)", f"optimizer.{name}=0.9")
    for key, number in {
        "optimizer.adam_eps": optimizer.adam_eps,
        "model.layernorm_epsilon": model.layernorm_epsilon,
        "model.init_method_std": model.init_method_std,
        "model.moe_router_topk_scaling_factor": model.moe_router_topk_scaling_factor,
    }.items():
        if number <= 0:
            yield Violation((key,), "must be positive")
    for key, number in {
        "optimizer.weight_decay": optimizer.weight_decay,
        "optimizer.clip_grad": optimizer.clip_grad,
        "model.moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "model.moe_router_bias_update_rate": model.moe_router_bias_update_rate,
        "model.mtp_loss_scaling_factor": model.mtp_loss_scaling_factor,
    }.items():
        if number < 0:
            yield Violation((key,), "must not be negative", f"{key}=0.0")
