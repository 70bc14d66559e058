"""What ranks do in the emulation test: every quantised linear of a real model against a float64 recomputation.

Hooks record each linear's input, output and gradients in one micro-batch; sharded ones are gathered here with plain
collectives, so that amax and blocks are those of the whole tensors that Transformer Engine quantises.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from layouts import batches, started
from tiny import tiny_run
from torch import Tensor, nn

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.layers import (
    ColumnParallelLinear,
    GroupedLinear,
    LayerNormColumnParallelLinear,
    RowParallelLinear,
)
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.lowering.torch import installed_gemms, lower
from nemotron3_megatron.precision.plan import precision_plan
from nemotron3_megatron.precision.policy import Format, Nvfp4, Policy
from nemotron3_megatron.precision.verify import verify
from nemotron3_megatron.train.step import Trainer, accumulate_gradients
from tests.oracles.products import error, products

NEAREST = Nvfp4(stochastic_rounding=None)


def blocky_run(world_size: int, **options: Any) -> Run:
    """``tiny_run`` with widths that are whole blocks of 32 under TP=2, and one micro-batch a rank."""
    run = tiny_run(world_size, **options)
    model = replace(
        run.model,
        hidden_size=64,
        kv_channels=16,
        ffn_hidden_size=64,
        mamba_num_heads=32,
        mamba_head_dim=4,
        moe_ffn_hidden_size=32,
        moe_shared_expert_intermediate_size=64,
        moe_latent_size=32,
    )
    stage = replace(run.stages[0], micro_batch_size=2, num_microbatches=1, global_batch_size=2 * run.layout.dp)
    return replace(run, model=model, stages=(stage,))


def errors(worlds: dict[str, dict[str, Any]], formats: list[Format]) -> dict[str, dict[str, list[float]]]:
    """For ``layout format``: each module's relative errors of Y, dX and dW on this rank."""
    port = int(os.environ["MASTER_PORT"])
    cases = [(name, number_format) for name in worlds for number_format in formats]
    results = {}
    for offset, (name, number_format) in enumerate(cases):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(worlds[name], blocky_run) as trainer:
            results[f"{name} {number_format}"] = _errors(trainer, number_format)
    return results


@dataclass
class Calls:
    """What went through one module, call by call (MTP's shared block is called once a depth)."""

    module: nn.Module
    x: list[Tensor] = field(default_factory=list)
    counts: list[list[int]] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    dx: list[Tensor] = field(default_factory=list)
    dy: list[Tensor] = field(default_factory=list)
    dw: dict[int, Tensor] = field(default_factory=dict)
    """By expert."""

    def watch(self) -> None:
        # A view of its own, so that its gradient is this linear's share and not the residual branch's too.
        self.module.register_forward_pre_hook(lambda _module, inputs: (inputs[0].view_as(inputs[0]), *inputs[1:]))
        self.module.register_forward_hook(self._forward)
        for expert, weight in enumerate(weights(self.module)):
            weight.register_hook(lambda gradient, expert=expert: self.dw.__setitem__(expert, gradient.clone()))

    def _forward(self, _module: nn.Module, inputs: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        self.x.append(inputs[0].detach().clone())
        self.y.append(output[0].detach().clone())
        if len(inputs) > 1:
            self.counts.append(list(inputs[1]))
        # Backward visits calls in reverse.
        inputs[0].register_hook(lambda gradient: self.dx.insert(0, gradient.clone()))
        output[0].register_hook(lambda gradient: self.dy.insert(0, gradient.clone()))


def weights(module: nn.Module) -> list[Tensor]:
    return module.weights() if isinstance(module, GroupedLinear) else [module.weight]


def _errors(trainer: Trainer, number_format: Format) -> dict[str, list[float]]:
    plan = precision_plan(Policy(default=number_format, nvfp4=NEAREST), trainer.run.model)
    lower(plan, trainer.chunks, torch.Generator())
    verify(plan, trainer.chunks, installed_gemms)
    calls = {n: Calls(m) for chunk in trainer.chunks for n, m in named_linears(chunk).items()}
    for call in calls.values():
        call.watch()
    accumulate_gradients(trainer, batches(trainer, 0)[:1], trainer.run.stages[0])
    return {name: _compare(call, trainer, number_format) for name, call in calls.items()}


def _compare(call: Calls, trainer: Trainer, number_format: Format) -> list[float]:
    module, group = call.module, trainer.groups.tp
    assert call.y, "the module was never called"
    if isinstance(module, GroupedLinear):
        return _compare_experts(call, number_format)
    worst = [0.0, 0.0]
    dw = torch.zeros_like(call.dw[0]).double()
    for x, y, dx, dy in zip(call.x, call.y, call.dx, call.dy, strict=True):
        seen = x
        if isinstance(module, LayerNormColumnParallelLinear):
            seen = F.rms_norm(x, (x.shape[-1],), module.layer_norm_weight, module.eps).detach()
        if isinstance(module, ColumnParallelLinear):
            seen = _gathered(seen, group)
            if module.gather_output:
                y, dy = (t.chunk(group.size(), -1)[group.rank()].contiguous() for t in (y, dy))
        elif isinstance(module, RowParallelLinear):
            dy = _gathered(dy, group)
        ey, edx, part = products(_flat(seen), module.weight.detach(), _flat(dy), number_format, NEAREST)
        dw += part
        if isinstance(module, ColumnParallelLinear):
            edx = _scattered(edx.view(*seen.shape), group)
        elif isinstance(module, RowParallelLinear):
            ey = _scattered(ey.view(*seen.shape[:-1], -1), group)
        if isinstance(module, LayerNormColumnParallelLinear):
            edx = _through_norm(x, edx.view(x.shape), module)
        worst[0] = max(worst[0], error(_flat(y), _flat(ey)))
        worst[1] = max(worst[1], error(_flat(dx), _flat(edx)))
    return [*worst, error(call.dw[0], dw)]


def _compare_experts(call: Calls, number_format: Format) -> list[float]:
    worst = [0.0, 0.0, 0.0]
    dw = [torch.zeros_like(w).double() for w in weights(call.module)]
    for x, counts, y, dx, dy in zip(call.x, call.counts, call.y, call.dx, call.dy, strict=True):
        for expert, (ex, ey, edx, edy) in enumerate(zip(*(t.split(counts) for t in (x, y, dx, dy)), strict=True)):
            if len(ex) == 0:
                continue
            rows = [F.pad(t, (0, 0, 0, -len(t) % 32)) for t in (ex, edy)]
            py, pdx, pdw = products(rows[0], weights(call.module)[expert].detach(), rows[1], number_format, NEAREST)
            dw[expert] += pdw
            worst[0] = max(worst[0], error(ey, py[: len(ex)]))
            worst[1] = max(worst[1], error(edx, pdx[: len(ex)]))
    found = torch.stack([call.dw[expert] for expert in range(len(dw))])
    return [*worst[:2], error(found, torch.stack(dw))]


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _gathered(x: Tensor, group: Any) -> Tensor:
    parts = [torch.empty_like(x) for _ in range(group.size())]
    torch.distributed.all_gather(parts, x.contiguous(), group=group)
    return torch.cat(parts)


def _scattered(x: Tensor, group: Any) -> Tensor:
    """This rank's part of the tokens of the sum over ranks."""
    whole = x.clone()
    torch.distributed.all_reduce(whole, group=group)
    return whole.chunk(group.size())[group.rank()]


def _through_norm(x: Tensor, gradient: Tensor, module: LayerNormColumnParallelLinear) -> Tensor:
    wide = x.double().requires_grad_()
    normed = F.rms_norm(wide, (x.shape[-1],), module.layer_norm_weight.detach().double(), module.eps)
    return torch.autograd.grad(normed, wide, gradient)[0]
