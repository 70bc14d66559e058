"""What ranks do in the tests of precision telemetry: a step's statistics as observed, and from the GEMMs' operands."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch
from emulation import blocky_run
from layouts import batches, started
from torch import Tensor, nn

from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.lowering.torch import lower
from nemotron3_megatron.precision.observe import Observer, Reading, reads
from nemotron3_megatron.precision.plan import PrecisionPlan, precision_plan
from nemotron3_megatron.precision.policy import Nvfp4, Policy, Rule
from nemotron3_megatron.precision.statistics import Summary, operand_statistics, summary
from nemotron3_megatron.train.step import Trainer, accumulate_gradients, train_step

POLICY = Policy(
    default="nvfp4",
    rules=(Rule(format="mxfp8", role=("mamba.out_proj",)), Rule(format="bf16", role=("mlp.fc1",))),
    nvfp4=Nvfp4(stochastic_rounding=None),
)
"""Rounding to nearest only: what is drawn at random is drawn elsewhere in every layout."""

Log = dict[tuple[str, str], list[Tensor]]
Found = dict[str, dict[str, float]]


def observe(worlds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Found]]:
    """For each layout: summaries by ``module tensor direction``, ``observed`` by hooks and ``recorded`` by GEMMs."""
    port = int(os.environ["MASTER_PORT"])
    results = {}
    for offset, (name, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options, blocky_run) as trainer:
            plan = precision_plan(POLICY, trainer.run.model)
            modules = _modules(trainer)
            observer = Observer(plan, modules, torch.device("cpu"), calls=8)  # 4 micro-batches, 2 depths
            state = torch.get_rng_state()
            with _recorded(modules) as log:
                observer.arm(1)
                accumulate_gradients(trainer, batches(trainer, 0), trainer.run.stages[0])
                found = observer.collect()
            assert torch.equal(torch.get_rng_state(), state), "telemetry drew from training's random numbers"
            assert not any(module._forward_hooks for module in modules.values()), "a hook was left behind"
            results[name] = {"observed": _named(found), "recorded": _named(_from_log(plan, modules, log))}
    return results


def losses_with_telemetry() -> list[list[tuple[float, ...]]]:
    """Losses of three steps: without telemetry, and with every second one observed."""
    port = int(os.environ["MASTER_PORT"])
    results = []
    for observed in (False, True):
        os.environ["MASTER_PORT"] = str(port + observed)
        with started({}, blocky_run) as trainer:
            plan = precision_plan(Policy(default="nvfp4"), trainer.run.model)
            lower(plan, trainer.chunks, torch.default_generator)
            observer = Observer(plan, _modules(trainer), torch.device("cpu"))
            losses = []
            for step in range(1, 4):
                if sampled := observed and step % 2 == 0:
                    observer.arm(step)
                losses.append(train_step(trainer, batches(trainer, step), trainer.run.stages[0], 1e-3).losses)
                assert not sampled or observer.collect()
            results.append(losses)
    return results


def _modules(trainer: Trainer) -> dict[str, nn.Module]:
    return {name: module for chunk in trainer.chunks for name, module in named_linears(chunk).items()}


class _Product(torch.autograd.Function):
    """x (T, K) @ weight (N, K).T that keeps what fprop and wgrad multiply, once for each backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, keep: Callable[[Tensor, Tensor], None]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.keep = keep
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        (dy,) = gradients
        ctx.keep(x, dy)
        return dy @ weight, dy.T @ x, None


@contextmanager
def _recorded(modules: dict[str, nn.Module]) -> Iterator[Log]:
    """Let each linear multiply through ``_Product``; inputs and gradients by (module, tensor), experts apart."""
    log: Log = {}

    def product(name: str, x: Tensor, weight: Tensor) -> Tensor:
        def keep(x: Tensor, dy: Tensor) -> None:
            if len(x):
                log.setdefault((name, "input"), []).append(x)
                log.setdefault((name, "gradient"), []).append(dy)

        flat = x.reshape(-1, x.shape[-1])
        y: Tensor = _Product.apply(flat, weight, keep)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], len(weight))

    def dense(name: str) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, weight: product(name, x, weight)

    def grouped(name: str) -> Callable[[Tensor, Sequence[Tensor], Sequence[int]], Tensor]:
        return lambda x, weights, counts: torch.cat(
            [product(name, part, weight) for part, weight in zip(x.split(list(counts)), weights, strict=True)]
        )

    for name, module in modules.items():
        module.gemm = (grouped if "experts.linear" in name and "shared" not in name else dense)(name)  # type: ignore[assignment]
    yield log


def _from_log(plan: PrecisionPlan, modules: dict[str, nn.Module], log: Log) -> list[tuple[Reading, Summary]]:
    """The same statistics from the operands of the GEMMs themselves, each with its own amax."""
    found = []
    for row in plan.rows:
        for operand, along in reads(row.gemms) if row.format != "bf16" else ():
            sums, maxima = torch.zeros(8, dtype=torch.float64), torch.full((3,), -torch.inf, dtype=torch.float64)
            if operand.tensor == "weight":
                module = modules.get(row.module, nn.Module())
                tensors = [p.data for name, p in module.named_parameters() if name.startswith("weight")]
            else:
                tensors = log.get((row.module, operand.tensor), [])
            for tensor in tensors:
                one = operand_statistics([tensor], operand, along)
                sums, maxima = sums + one.sums, torch.maximum(maxima, one.maxima)
            torch.distributed.all_reduce(sums)
            torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
            found.append((Reading(row, operand, along), summary(sums.tolist(), maxima.tolist())))
    return found


def _named(found: list[tuple[Reading, Summary]]) -> Found:
    return {f"{r.row.module} {r.operand.tensor} {r.along}": asdict(values) for r, values in found}
