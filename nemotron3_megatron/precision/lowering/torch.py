"""The plan on the torch spec: each quantised linear gets a product of its own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from nemotron3_megatron.model.layers import GroupedLinear
from nemotron3_megatron.precision.emulation.gemm import EmulatedGemm, EmulatedGroupedGemm
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.operands import Gemms
from nemotron3_megatron.precision.plan import PrecisionPlan
from nemotron3_megatron.precision.selftest import Linear


def lower(plan: PrecisionPlan, chunks: Iterable[nn.Module], generator: torch.Generator) -> None:
    """Install the plan's quantised GEMMs on a rank's model chunks.

    Args:
        plan: of the whole model.
        chunks: this rank's, in the torch spec.
        generator: the device's, for stochastic rounding; its state belongs to the checkpoint.
    """
    rows = {row.module: row for row in plan.rows}
    for chunk in chunks:
        for name, module in named_linears(chunk).items():
            if rows[name].format != "bf16":
                gemm = EmulatedGroupedGemm if isinstance(module, GroupedLinear) else EmulatedGemm
                module.gemm = gemm(rows[name].gemms, generator)  # type: ignore[assignment]


def trial(gemms: Gemms, generator: torch.Generator) -> Linear:
    """A linear of this backend, for the self-test."""
    product = EmulatedGemm(gemms, generator)

    def run(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        leaves = (x.clone().requires_grad_(), weight.clone().requires_grad_())
        y = product(*leaves)
        dx, dw = torch.autograd.grad(y, leaves, dy)
        return y.detach(), dx, dw

    return run


def installed_gemms(module: nn.Module) -> Gemms | None:
    """The operands that a torch linear quantises; None: none."""
    gemm = module.gemm
    return gemm.gemms if isinstance(gemm, EmulatedGemm | EmulatedGroupedGemm) else None
