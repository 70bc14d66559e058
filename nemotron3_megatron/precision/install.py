"""From plan to modules: choose the backend, try it on the device, install it, check what is installed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.builder import chosen_spec
from nemotron3_megatron.model.transformer_config import DTYPES
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.platform.base import Spec
from nemotron3_megatron.precision.backend import Backend, Machine, choose_backend, probe
from nemotron3_megatron.precision.emulation.read import default_generator
from nemotron3_megatron.precision.operands import Gemms
from nemotron3_megatron.precision.plan import PrecisionPlan
from nemotron3_megatron.precision.policy import Format
from nemotron3_megatron.precision.selftest import Linear, directions, self_test
from nemotron3_megatron.precision.verify import verify

_log = logging.getLogger(__name__)


def backend_of(run: Run, platform: Platform) -> Backend:
    """The backend in force for a run on this rank's machine.

    Raises:
        UserError: the backend that the recipe asks for is impossible here.
    """
    spec = chosen_spec(run.model, platform)
    formats = {row.format for row in run.precision_plan.rows}
    machine = probe(spec) if formats - {"bf16"} else Machine(capability=None)
    return choose_backend(run.precision.backend, formats, run.precision.dtype, spec, machine)


def install_precision(run: Run, platform: Platform, chunks: Sequence[nn.Module], backend: Backend) -> None:
    """Make a rank's built model compute what the run's plan says; a collective over the world.

    Draws random numbers for the self-test, so it belongs before a checkpoint restores the generators.

    Args:
        run: has the plan.
        platform: this rank's.
        chunks: built for ``backend``.
        backend: from :func:`backend_of`.

    Raises:
        UserError: the environment changes the numerics.
        PrecisionSelfTestError: a device does not compute what the plan needs.
        PrecisionMismatchError: a built module is not what was planned.
    """
    plan = run.precision_plan
    if backend != "none":
        lowering = _lowering(chosen_spec(run.model, platform), backend, platform.device)
        used = directions(plan)
        linears = {name: lowering.trial(name, gemms) for name, gemms in used.items()}
        self_test(used, linears, platform.device, DTYPES[run.precision.dtype])
        lowering.lower(plan, chunks)
        verify(plan, chunks, lowering.installed_gemms)
    if torch.distributed.get_rank() == 0:
        _log.info("%s", summary(run.precision.name, plan, backend, run.precision.dtype))


@dataclass(frozen=True, slots=True)
class _Lowering:
    """A backend on a module spec."""

    trial: Callable[[Format, Gemms], Linear]
    lower: Callable[[PrecisionPlan, Sequence[nn.Module]], None]
    installed_gemms: Callable[[nn.Module], Gemms | None]


def _lowering(spec: Spec, backend: Literal["native", "emulated"], device: torch.device) -> _Lowering:
    if spec == "te":
        from nemotron3_megatron.precision.lowering import installed, te

        def lower_te(plan: PrecisionPlan, chunks: Sequence[nn.Module]) -> None:
            te.lower(plan, chunks, backend)

        return _Lowering(lambda name, gemms: te.trial(name, gemms, backend), lower_te, installed.installed_gemms)
    from nemotron3_megatron.precision.lowering import torch as emulated

    generator = default_generator(device)

    def lower_torch(plan: PrecisionPlan, chunks: Sequence[nn.Module]) -> None:
        emulated.lower(plan, chunks, generator)

    return _Lowering(lambda _, gemms: emulated.trial(gemms, generator), lower_torch, emulated.installed_gemms)


def summary(name: str, plan: PrecisionPlan, backend: Backend, dtype: str) -> str:
    """One line that cannot be misread: what computes in what, and whether it is the real thing."""
    counts = Counter(row.format for row in plan.rows)
    if backend == "none":
        return f"precision {name}: {counts.total()} linears in {dtype}"
    formats = ", ".join(f"{count} {dtype if kind == 'bf16' else kind}" for kind, count in sorted(counts.items()))
    how = {
        "native": "native kernels",
        "emulated": f"EMULATED: the rounding of the formats around {dtype} products, none of their speed",
    }[backend]
    return f"precision {name}: linears {formats}; {how}"
