"""What ranks do in test_te_lowering: real Megatron models of Transformer Engine's linears, on CPU.

The linears, the contexts around them and the experts are Megatron-Core's and TE's own; mixer, attention and norms,
which need CUDA and have no part in precision, are those of the torch spec.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
import torch.nn.functional as F
import yaml
from torch import Tensor

Backend = Literal["native", "emulated"]
Recorded = dict[str, list[Any]]

TESTS = Path(__file__).parents[1]


@contextmanager
def lowered(
    options: dict[str, Any], backend: Backend, policy: str, *, device_counts: bool = False, fused: bool = False
) -> Iterator[tuple[Any, Any]]:
    """The plan of a policy, and a trainer whose model is lowered to it.

    Args:
        options: of ``blocky_run``.
        backend: of the plan; a plan without quantised modules is not lowered.
        policy: YAML.
        device_counts: those of ``model/device_counts.py``.
        fused: weight gradients are added to ``main_grad`` by the linears themselves.
    """
    _import_te(backend)
    import layouts
    from emulation import blocky_run

    from nemotron3_megatron.model import builder
    from nemotron3_megatron.platform.cpu import CpuPlatform
    from nemotron3_megatron.precision.lowering.recipes import model_fields
    from nemotron3_megatron.precision.lowering.te import lower
    from nemotron3_megatron.precision.parse import parse_policy
    from nemotron3_megatron.precision.plan import precision_plan

    make_run = partial(blocky_run, spec="te")
    plan = precision_plan(
        parse_policy(yaml.safe_load(policy)), make_run(int(os.environ["WORLD_SIZE"]), **options).model
    )

    quantised = any(row.format != "bf16" for row in plan.rows)
    te_flags = {"transformer_impl": "transformer_engine", "gradient_accumulation_fusion": fused}
    te_flags |= model_fields(plan, backend) if quantised else {}

    @dataclass(frozen=True, slots=True)
    class TePlatform(CpuPlatform):
        def megatron_flags(self, spec: Any = None) -> dict[str, object]:
            return CpuPlatform.megatron_flags(self, "torch") | te_flags

    _set(layouts, select=lambda device: TePlatform())
    _set(builder, stack_spec=lambda run, *_: _stack(run, device_counts=device_counts))
    with layouts.started(options, make_run) as trainer:
        if quantised:
            lower(plan, trainer.chunks, backend)
        yield plan, trainer


def _import_te(backend: Backend) -> None:
    """Make ``transformer_engine`` importable, on a pretended B200 or H100."""
    if "transformer_engine" in sys.modules:
        return
    sys.path += [str(TESTS.parent), str(TESTS / "parity"), str(TESTS / "distributed")]
    import te_on_cpu

    te_on_cpu.install(os.environ["TRANSFORMER_ENGINE_SOURCES"], (10, 0) if backend == "native" else (9, 0))


def _set(module: ModuleType, **names: Any) -> None:
    """In this process, which ends with the test."""
    vars(module).update(names)


def _stack(run: Any, *, device_counts: bool) -> Any:
    from megatron.core.extensions import transformer_engine as te

    from nemotron3_megatron.config.experts import gathers_tokens
    from nemotron3_megatron.model.attention import DocumentAttention
    from nemotron3_megatron.model.hybrid import TorchHybridStack
    from nemotron3_megatron.model.layers import RMSNorm
    from nemotron3_megatron.model.mixer import TorchMambaMixer
    from nemotron3_megatron.model.specs.stack import StackClasses, stack_spec
    from nemotron3_megatron.model.specs.te import expert_layer

    classes = StackClasses(
        stack=TorchHybridStack,
        norm=RMSNorm,
        norm_linear=te.TELayerNormColumnParallelLinear,
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        core_attention=DocumentAttention,
        mixer=TorchMambaMixer,
        moe=expert_layer(run.model.num_moe_experts, device_counts=device_counts, gathers=gathers_tokens(run)),
    )
    return stack_spec(classes, run.model.mamba_chunk_size)


def each(what: str, worlds: dict[str, tuple[dict[str, Any], str]]) -> dict[str, Recorded]:
    """``native`` or ``emulated`` of several layouts and policies, in one process."""
    port = int(os.environ["MASTER_PORT"])
    results = {}
    for offset, (name, (options, policy)) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        results[name] = globals()[what](options, policy)
    return results


def native(options: dict[str, Any], policy: str) -> Recorded:
    """For each module of this rank: operands planned, operands that TE's objects announce before the first step, and
    those that TE made inside each forward pass of ``pp`` micro-batches, with the experts' token counts.

    The products themselves are BF16 here: native quantisation needs a GPU.
    """
    with lowered(options, "native", policy) as (plan, trainer):
        import layouts
        from transformer_engine.pytorch import GroupedLinear, LayerNormLinear, Linear

        from nemotron3_megatron.precision.lowering.installed import installed_gemms, used_gemms
        from nemotron3_megatron.precision.lowering.names import named_linears
        from nemotron3_megatron.train.step import accumulate_gradients

        modules = {name: m for chunk in trainer.chunks for name, m in named_linears(chunk).items()}
        names = {module: name for name, module in modules.items()}
        announced = {name: _plain(installed_gemms(module)) for name, module in modules.items()}
        seen: dict[str, list[Any]] = {name: [] for name in modules}

        def record(module: Any, x: Tensor, counts: Any, is_first_microbatch: bool | None = None) -> Tensor:
            experts = getattr(module, "num_gemms", 1)
            module.prepare_forward(x, num_gemms=experts)
            module.end_forward()
            seen[names[module]].append([_plain(used_gemms(module)), counts or []])
            if counts:
                rows = zip(x.split(counts), module.parameters(), strict=True)
                return torch.cat([F.linear(part, weight) for part, weight in rows])
            if isinstance(module, LayerNormLinear):
                x = F.rms_norm(x, (x.shape[-1],), module.layer_norm_weight, module.eps)
            return F.linear(x, module.weight)

        for kind in (Linear, LayerNormLinear):
            kind.forward = lambda module, x, **options: record(module, x, None, **options)
        GroupedLinear.forward = record
        # An interleaved schedule wants a micro-batch for each stage.
        batches = layouts.batches(trainer, 0)[: trainer.run.layout.pp]
        accumulate_gradients(trainer, batches, trainer.run.stages[0])
        rows = {row.module: _planned(row) for row in plan.rows}
        return {name: [rows[name], announced[name], seen[name]] for name in modules}


def _planned(row: Any) -> Any:
    return None if row.format == "bf16" else _plain(row.gemms)


def _plain(gemms: Any) -> Any:
    """As JSON gives it back."""
    return gemms if gemms is None else {k: [_listed(o) for o in v] for k, v in asdict(gemms).items()}


def _listed(operand: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in operand.items()}


def emulated(options: dict[str, Any], policy: str) -> Recorded:
    """For each module: relative errors of Y, dX and dW of one micro-batch against the float64 recomputation that the
    torch spec is held to (tests/distributed/emulation.py), and the operands TE's own objects hold afterwards."""
    device_counts = "device_counts" in options
    options = {name: value for name, value in options.items() if name != "device_counts"}
    with lowered(options, "emulated", policy, device_counts=device_counts) as (plan, trainer):
        import emulation
        import layouts
        from megatron.core.extensions import transformer_engine as te

        from nemotron3_megatron.precision.lowering.installed import installed_gemms, used_gemms
        from nemotron3_megatron.precision.lowering.names import named_linears
        from nemotron3_megatron.precision.lowering.te import trial
        from nemotron3_megatron.precision.parse import parse_policy
        from nemotron3_megatron.precision.selftest import directions, self_test
        from nemotron3_megatron.precision.verify import verify
        from nemotron3_megatron.train.step import accumulate_gradients

        _set(
            emulation,
            NEAREST=parse_policy(yaml.safe_load(policy)).nvfp4,
            GroupedLinear=te.TEGroupedLinear,
            LayerNormColumnParallelLinear=te.TELayerNormColumnParallelLinear,
            ColumnParallelLinear=(te.TEColumnParallelLinear, te.TELayerNormColumnParallelLinear),
            RowParallelLinear=te.TERowParallelLinear,
            weights=_weights,
        )
        te.TEColumnParallelLinear.gather_output = te.TELayerNormColumnParallelLinear.gather_output = False

        used = directions(plan)
        self_test(used, {f: trial(f, g, "emulated") for f, g in used.items()}, torch.device("cpu"), torch.float32)
        verify(plan, trainer.chunks, installed_gemms)
        batches, stage = layouts.batches(trainer, 0)[:1], trainer.run.stages[0]
        # A step that keeps quantised weights, which are of no use in the next.
        accumulate_gradients(trainer, batches, stage)
        with torch.no_grad():
            for parameter in trainer.chunks[0].parameters():
                parameter.mul_(1.25)
        calls = {n: emulation.Calls(m) for chunk in trainer.chunks for n, m in named_linears(chunk).items()}
        for call in calls.values():
            call.watch()
        accumulate_gradients(trainer, layouts.batches(trainer, 0)[:1], trainer.run.stages[0])
        if device_counts:
            for call in calls.values():
                call.counts = [[b - a for a, b in pairwise([0, *ends])] for ends in call.counts]
        rows = {row.module: row for row in plan.rows}
        return {
            name: [
                emulation._compare(call, trainer, rows[name].format),
                _planned(rows[name]),
                _plain(used_gemms(call.module)),
            ]
            for name, call in calls.items()
        }


def _weights(module: Any) -> list[Tensor]:
    """In the order of experts, whatever the order of registration."""
    found = {name: parameter for name, parameter in module.named_parameters() if name.startswith("weight")}
    return [found[name] for name in sorted(found, key=lambda name: (len(name), name))]


def single_modules() -> dict[str, bool]:
    """Stochastic rounding draws from the default generator, and weight gradients are added to ``main_grad``."""
    _import_te("emulated")
    import transformer_engine.pytorch as te
    from transformer_engine.common.recipe import CustomRecipe

    from nemotron3_megatron.precision.emulation.read import read
    from nemotron3_megatron.precision.emulation.te import QuantizerFactory
    from nemotron3_megatron.precision.lowering.variants import VARIANTS

    gemms = VARIANTS["nvfp4"]
    linear = te.Linear(64, 96, bias=False, device="cpu", fuse_wgrad_accumulation=True)
    linear.weight.main_grad = torch.ones(96, 64)
    linear.weight.grad_added_to_main_grad = False
    x, dy = torch.randn(32, 64, requires_grad=True), torch.randn(32, 96)
    draws = []
    for _ in range(2):
        linear.weight.main_grad.fill_(1)
        with te.autocast(enabled=True, recipe=CustomRecipe(qfactory=QuantizerFactory(gemms))):
            y = linear(x)
        before = torch.get_rng_state()
        draws.append(torch.autograd.grad(y, x, dy)[0])
    torch.set_rng_state(before)
    options: dict[str, Any] = {"generator": torch.default_generator, "fold": True}
    rows, columns = read(dy, gemms.dgrad[0], gemms.wgrad[0], **options)
    weight, _ = read(linear.weight.detach(), gemms.fprop[1], None, fold=True)
    _, tokens = read(x.detach(), None, gemms.wgrad[1], fold=True)
    assert rows is not None
    assert columns is not None
    assert weight is not None
    assert tokens is not None
    return {
        "dx": torch.equal(draws[1], rows.values @ weight.values),
        "added dw": torch.equal(linear.weight.main_grad, 1 + columns.values.T @ tokens.values),
        "marked": linear.weight.grad_added_to_main_grad,
        "another draw": not torch.equal(*draws),
    }


def mistakes() -> dict[str, str]:
    """What is said of modules that lowering missed, and of one that does what no plan describes."""
    with lowered({}, "native", "{default: nvfp4}") as (plan, trainer):
        from nemotron3_megatron.precision.lowering.installed import installed_gemms
        from nemotron3_megatron.precision.lowering.names import named_linears
        from nemotron3_megatron.precision.lowering.te import quantization_config
        from nemotron3_megatron.precision.lowering.variants import VARIANTS
        from nemotron3_megatron.precision.verify import verify

        linears: dict[str, Any] = named_linears(trainer.chunks[0])
        linears["decoder.layers.1.mlp.shared_experts.linear_fc1"].finish_init(None)
        found = {"forgotten": _message(lambda: verify(plan, trainer.chunks, installed_gemms))}
        linears["decoder.layers.1.mlp.shared_experts.linear_fc1"].finish_init(
            quantization_config("mxfp8", VARIANTS["mxfp8"], "native")
        )
        found["another"] = _message(lambda: verify(plan, trainer.chunks, installed_gemms))
        return found


def _message(action: Any) -> str:
    try:
        action()
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    return ""
