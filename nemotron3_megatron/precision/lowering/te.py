"""The plan on the te spec: every module gets a quantisation context of its own through Megatron-Core's public hook."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any, Literal

import torch
import transformer_engine.pytorch as te
from megatron.core.extensions.transformer_engine import (
    TEGroupedLinear,
    TEQuantizationParams,
    _get_fp8_autocast_for_quant_params,
)
from megatron.core.quantization.quant_config import MatchContext, QuantizationConfig
from torch import Tensor, nn

from nemotron3_megatron.model.device_counts import DeviceCountsLinear
from nemotron3_megatron.precision.emulation.te_grouped import EmulatedDeviceCountsForward, EmulatedGroupedForward
from nemotron3_megatron.precision.lowering.environment import check_environment
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.lowering.recipes import module_config, module_recipe
from nemotron3_megatron.precision.operands import Gemms
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Format
from nemotron3_megatron.precision.selftest import Linear


def lower(plan: PrecisionPlan, chunks: Iterable[nn.Module], backend: Literal["native", "emulated"]) -> None:
    """Install the plan's GEMMs on a rank's model chunks.

    Args:
        plan: of the whole model.
        chunks: this rank's, in the te spec, built with the fields of
            :func:`nemotron3_megatron.precision.lowering.recipes.model_fields`.
        backend: whose kernels.

    Raises:
        UserError: an environment variable would change the numerics.
    """
    check_environment(os.environ)
    rows = {row.module: row for row in plan.rows}
    for chunk in chunks:
        for name, module in named_linears(chunk).items():
            _install(module, rows[name], backend)


def quantization_config(
    number_format: Format, gemms: Gemms, backend: Literal["native", "emulated"]
) -> QuantizationConfig:
    """What ``finish_init`` takes; the matched name is for messages only."""
    config = module_config(module_recipe(number_format, gemms, backend))
    return QuantizationConfig(config, MatchContext("", None), number_format)


def trial(number_format: Format, gemms: Gemms, backend: Literal["native", "emulated"]) -> Linear:
    """A linear of this backend, for the self-test: what ``lower`` makes of a module, on a module of its own."""

    def run(x: Tensor, weight: Tensor, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        linear = te.Linear(*reversed(weight.shape), bias=False, params_dtype=weight.dtype, device=weight.device)
        linear.weight.data.copy_(weight)
        leaf = x.clone().requires_grad_()
        parameters = TEQuantizationParams.parse_from_config(quantization_config(number_format, gemms, backend))
        with _get_fp8_autocast_for_quant_params(parameters, True):
            y = linear(leaf)
        dx, dw = torch.autograd.grad(y, (leaf, linear.weight), dy)
        return y.detach(), dx, dw

    return run


def _install(module: Any, row: PlanRow, backend: Literal["native", "emulated"]) -> None:
    if backend == "emulated" and row.format != "bf16" and isinstance(module, TEGroupedLinear):
        module.finish_init(None)
        local = isinstance(module, DeviceCountsLinear)
        module.forward = (EmulatedDeviceCountsForward if local else EmulatedGroupedForward)(module, row.gemms)
        module.spare_rows = False  # they would be quantised
    else:
        module.finish_init(quantization_config(row.format, row.gemms, backend))
