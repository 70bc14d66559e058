"""What ranks do in the optimizer tests; every function returns plain JSON for the test to judge."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from layouts import batches, started
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

from nemotron3_megatron.checkpoint import adam, content
from nemotron3_megatron.train.optimizer import set_learning_rate, update
from nemotron3_megatron.train.step import StepResult, Trainer, accumulate_gradients, train_step

LEARNING_RATE = 1e-3
BAD_RANK = 1
PRESET_COUNT = 4096
"""bfloat16 numbers lie 32 apart here."""

CHECKS: dict[str, tuple[str, dict[str, Any]]] = {
    "refused_fp32": ("refused", {"ep": 2}),
    "refused_bf16": ("refused", {"ep": 2, "dtype": "bf16"}),
    "refused_plain": ("refused", {"ep": 2, "distributed_optimizer": False}),
    "refused_pp": ("refused", {"pp": 2}),
    "types": ("types", {"ep": 2, "dtype": "bf16"}),
    "types_plain": ("types", {"ep": 2, "dtype": "bf16", "distributed_optimizer": False}),
    "expert_bias": ("expert_bias", {"ep": 2, "dtype": "bf16"}),
    "weight_decay": ("weight_decay", {"ep": 2}),
    "adamw": ("adamw", {"ep": 2, "distributed_optimizer": False}),
}


def check_all() -> dict[str, Any]:
    """All checks in one launch."""
    return {name: globals()[check](options) for name, (check, options) in CHECKS.items()}


def refused(options: dict[str, Any]) -> dict[str, Any]:
    """Steps 0, 1, 2 and 3, once with a step between 1 and 2 that has a NaN gradient on one rank."""
    with _own_world(options) as trainer:
        undisturbed = [_outcome(_step(trainer, i)) for i in range(4)]
        end = _digests(trainer)
    with _own_world(options) as trainer:
        steps = [_outcome(_step(trainer, i)) for i in range(2)]
        before = _digests(trainer)
        with _nan_gradient(trainer, options) as name:
            bad = _step(trainer, 9)
        after = _digests(trainer)
        steps += [_outcome(_step(trainer, i)) for i in range(2, 4)]
        return {
            "applied": bad.update.applied,
            "named": list(bad.update.non_finite),
            "broken": name,
            "finite_loss": math.isfinite(bad.losses[0]),
            "finite_norm": math.isfinite(bad.update.grad_norm),
            "changed": [key for key in before if before[key] != after[key]],
            "kinds": sorted({key.split(".")[0] for key in before}),
            "differs_at_end": [key for key, digest in _digests(trainer).items() if digest != end[key]],
            "steps": steps,
            "undisturbed": undisturbed,
        }


def types(options: dict[str, Any]) -> dict[str, Any]:
    """Types after a step: parameters and buffers by name, optimizer tensors by kind, gradients."""
    with _own_world(options) as trainer:
        _step(trainer, 0)
        (chunk,) = trainer.chunks
        return {
            "parameters": {name: str(p.dtype) for name, p in chunk.named_parameters()},
            "buffers": {name: str(b.dtype) for name, b in chunk.named_buffers()},
            "gradients": sorted({str(p.main_grad.dtype) for p in chunk.parameters()}),
            "optimizer": sorted({f"{kind(key)} {t.dtype}" for key, t in _optimizer_tensors(trainer).items()}),
            "adam": sorted(
                {
                    str(group_parameter.dtype)
                    for part in adam.parts(trainer.optimizer)
                    for group in part.optimizer.param_groups
                    for group_parameter in group["params"]
                }
            ),
        }


def kind(key: str) -> str:
    """``optimizer.state.exp_avg.decoder...`` -> ``exp_avg``."""
    return key.removeprefix(f"{adam.PREFIX}.").split(".")[0]


def expert_bias(options: dict[str, Any]) -> dict[str, Any]:
    """One real step whose token counts start at PRESET_COUNT, and the routing it did, counted in integers."""
    with _own_world(options) as trainer:
        (chunk,) = trainer.chunks
        routers = {name: m for name, m in chunk.named_modules() if hasattr(m, "local_tokens_per_expert")}
        counts = {name: torch.full((trainer.run.model.num_moe_experts,), PRESET_COUNT) for name in routers}
        for name, router in routers.items():
            router.local_tokens_per_expert.fill_(PRESET_COUNT)
            router.register_forward_hook(_counter(counts[name]))
        before = {name: router.expert_bias.clone() for name, router in routers.items()}
        _step(trainer, 0)
        for count in counts.values():
            torch.distributed.all_reduce(count)
        return {
            name: {
                "counts": counts[name].tolist(),
                "change": (router.expert_bias - before[name]).tolist(),
                "left_over": router.local_tokens_per_expert.abs().max().item(),
            }
            for name, router in routers.items()
        }


def weight_decay(options: dict[str, Any]) -> dict[str, Any]:
    """An update with zero gradients moves weights by decay only: the factor each parameter was multiplied by."""
    with _own_world(options) as trainer:
        (chunk,) = trainer.chunks
        with torch.no_grad():
            for parameter in chunk.parameters():
                parameter.fill_(1.0)
        trainer.optimizer.reload_model_params()
        for wrapped in trainer.model:
            wrapped.zero_grad_buffer()
        set_learning_rate(trainer.optimizer, 0.5)
        outcome = update(trainer.updates, trainer.model, trainer.run.optimizer.clip_grad)
        return {
            "applied": outcome.applied,
            "grad_norm": outcome.grad_norm,
            "decay": trainer.run.optimizer.weight_decay,
            "parameters": {
                name: {"ndim": p.ndim, "low": p.min().item(), "high": p.max().item()}
                for name, p in chunk.named_parameters()
            },
        }


def adamw(options: dict[str, Any]) -> dict[str, Any]:
    """Two updates against AdamW written out in float64, with the gradients clipped by their global norm."""
    with _own_world(options) as trainer:
        (chunk,) = trainer.chunks
        parameters = dict(chunk.named_parameters())
        wanted = {name: p.detach().double().clone() for name, p in parameters.items()}
        moments = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in wanted.items()}
        norms, clip = [], 0.01
        for step in (1, 2):
            accumulate_gradients(trainer, batches(trainer, step), trainer.run.stages[0])
            gradients = {name: p.main_grad.double().clone() for name, p in parameters.items()}
            norm = _global_norm(gradients)
            for name, gradient in gradients.items():
                _adamw(wanted[name], gradient * min(1.0, clip / norm), *moments[name], step, trainer)
            set_learning_rate(trainer.optimizer, LEARNING_RATE)
            outcome = update(trainer.updates, trainer.model, clip)
            norms.append([norm, outcome.grad_norm])
        errors = {name: (p.double() - wanted[name]).abs().max().item() for name, p in parameters.items()}
        return {
            "norms": norms,
            "clip": clip,
            "error": max(errors.values()),
            "worst": max(errors, key=errors.__getitem__),
        }


def _adamw(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    step: int,
    trainer: Trainer,
) -> None:
    options = trainer.run.optimizer
    beta1, beta2 = options.adam_beta1, options.adam_beta2
    if weight.ndim > 1:
        weight.mul_(1 - LEARNING_RATE * options.weight_decay)
    first.mul_(beta1).add_(gradient, alpha=1 - beta1)
    second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = (second / (1 - beta2**step)).sqrt() + options.adam_eps
    weight.sub_(LEARNING_RATE * (first / (1 - beta1**step)) / root)


def _global_norm(gradients: dict[str, torch.Tensor]) -> float:
    """Experts live on one rank each, all else on both."""
    experts = sum(g.square().sum() for name, g in gradients.items() if ".experts." in name)
    total = torch.as_tensor(experts)
    torch.distributed.all_reduce(total)
    return math.sqrt(total + sum(g.square().sum() for name, g in gradients.items() if ".experts." not in name))


@contextmanager
def _own_world(options: dict[str, Any]) -> Iterator[Trainer]:
    """A trainer in process groups of its own, behind a port of its own."""
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    with started(options) as trainer:
        yield trainer


def _step(trainer: Trainer, index: int) -> StepResult:
    return train_step(trainer, batches(trainer, index), trainer.run.stages[0], LEARNING_RATE)


def _outcome(result: StepResult) -> list[float]:
    return [*result.losses, result.update.grad_norm]


@contextmanager
def _nan_gradient(trainer: Trainer, options: dict[str, Any]) -> Iterator[str]:
    """One parameter of BAD_RANK gets NaN as gradient: its second expert, or its first Mamba layer's A_log.

    Yields its name under any layout.
    """
    if options.get("ep", 1) > 1:
        local, everywhere = "decoder.layers.1.mlp.experts.linear_fc1.weight1", "experts.linear_fc1.weight[5]"
    else:
        local, everywhere = "decoder.layers.0.mixer.A_log", "decoder.layers.4.mixer.A_log"
    if torch.distributed.get_rank() != BAD_RANK:
        yield everywhere
        return
    (chunk,) = trainer.chunks
    handle = chunk.get_parameter(local).register_hook(lambda gradient: gradient * math.nan)
    yield everywhere
    handle.remove()


def _digests(trainer: Trainer) -> dict[str, str]:
    """A hash of every weight, buffer, master weight, moment and step counter of this rank."""
    tensors = {f"optimizer.{key}": value for key, value in _optimizer_tensors(trainer).items()}
    for index, chunk in enumerate(trainer.chunks):
        tensors |= {f"weights.{index}.{name}": p for name, p in chunk.named_parameters()}
        tensors |= {f"buffers.{index}.{name}": b for name, b in chunk.named_buffers()}
    tensors["steps"] = torch.tensor(adam.current_step(trainer.optimizer))
    return {
        name: hashlib.sha256(t.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, t in tensors.items()
    }


def _optimizer_tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    adam.prepare(trainer.optimizer)
    shards = {"optimizer": content.sharded(trainer.model, trainer.optimizer)["optimizer"]}
    apply_factories(shards)
    found = [entry for entry in nested_values(shards) if isinstance(entry, ShardedTensor)]
    return {f"{entry.key}@{entry.global_offset}": entry.data for entry in found}


def _counter(count: torch.Tensor) -> Callable[..., None]:
    def add(_router: Any, _inputs: Any, output: tuple[torch.Tensor, torch.Tensor]) -> None:
        _, routing_map = output
        count.add_(routing_map.sum(dim=0).to(count.dtype))

    return add
