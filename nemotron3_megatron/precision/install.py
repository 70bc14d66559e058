"""From plan to modules: choose the backend, try it on the device, install it, check what is installed."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.builder import chosen_spec
from nemotron3_megatron.model.transformer_config import DTYPES
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.precision.backend import Backend, choose_backend, probe
from nemotron3_megatron.precision.lowering import torch as lowering
from nemotron3_megatron.precision.plan import PrecisionPlan
from nemotron3_megatron.precision.selftest import directions, self_test
from nemotron3_megatron.precision.verify import verify

_log = logging.getLogger(__name__)


def install_precision(run: Run, platform: Platform, chunks: Sequence[nn.Module]) -> Backend:
    """Make a rank's built model compute what the run's plan says; a collective over the world.

    Draws random numbers for the self-test, so it belongs before a checkpoint restores the generators.

    Returns:
        The backend in force.

    Raises:
        UserError: the backend that the recipe asks for is impossible here.
        PrecisionSelfTestError: a device does not compute what the plan needs.
        PrecisionMismatchError: a built module is not what was planned.
    """
    plan, spec = run.precision_plan, chosen_spec(run.model, platform)
    formats = {row.format for row in plan.rows}
    backend = choose_backend(run.precision.backend, formats, run.precision.dtype, spec, probe(spec))
    if backend != "none":
        generator = default_generator(platform.device)
        used = directions(plan)
        linears = {name: lowering.trial(operands, generator) for name, operands in used.items()}
        self_test(used, linears, platform.device, DTYPES[run.precision.dtype])
        lowering.lower(plan, chunks, generator)
        verify(plan, chunks, lowering.installed_gemms)
    if torch.distributed.get_rank() == 0:
        _log.info("%s", summary(run.precision.name, plan, backend, run.precision.dtype))
    return backend


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


def default_generator(device: torch.device) -> torch.Generator:
    """The device's own generator, whose state checkpoints hold."""
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    return torch.default_generator
