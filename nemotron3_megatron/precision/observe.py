"""Statistics of the operands of a running model: hooks on its quantised linears for the length of one step.

Hooks see tensors in high precision, before they are quantised, so that one code serves both module specs and both
backends.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemotron3_megatron.model.layers import rms_norm
from nemotron3_megatron.precision import operands
from nemotron3_megatron.precision.operands import Gemms, Operand
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.statistics import (
    MAXIMA,
    SAMPLED,
    SUMS,
    Along,
    OperandStatistics,
    Summary,
    largest_magnitudes,
    operand_statistics,
    summary,
)

CALLS = 2
"""Forward passes of a module that are looked at in a step, on each rank: more add cost, not knowledge."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One operand of one module, as one GEMM reads it."""

    row: PlanRow
    operand: Operand
    along: Along


class Observer:
    """Collects the statistics of a plan's quantised operands over one step, all ranks together.

    Every rank makes one, and all call :meth:`arm` and :meth:`collect` around the same steps.
    """

    def __init__(
        self,
        plan: PrecisionPlan,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        *,
        calls: int = CALLS,
        limit: int = SAMPLED,
    ) -> None:
        """Prepare.

        Args:
            plan: of the whole model.
            modules: this rank's linears by the plan's names.
            device: where they are, and where collectives run.
            calls: how many forward passes of a module to look at in a step.
            limit: how many elements of a tensor to look at.
        """
        rows = [row for row in plan.rows if row.format != "bf16"]
        self._readings = [Reading(row, operand, along) for row in rows for operand, along in reads(row.gemms)]
        self._places: dict[tuple[str, operands.Tensor], list[int]] = {}
        for place, reading in enumerate(self._readings):
            self._places.setdefault((reading.row.module, reading.operand.tensor), []).append(place)
        self._modules = {row.module: modules[row.module] for row in rows if row.module in modules}
        self._device = device
        # Its own: telemetry must not move the random numbers that training draws.
        self._generator = torch.Generator(device)
        self._calls = calls
        self._limit = limit
        self._found: list[tuple[int, OperandStatistics]] = []
        self._seen: dict[str, int] = {}
        self._hooks: list[RemovableHandle] = []

    def arm(self, step: int) -> None:
        """Start to look; ``step`` seeds stochastic rounding."""
        self._generator.manual_seed(step)
        self._seen = dict.fromkeys(self._modules, 0)
        self._hooks = [
            module.register_forward_hook(partial(self._forward_done, name)) for name, module in self._modules.items()
        ]

    def collect(self) -> list[tuple[Reading, Summary]]:
        """Stop looking; what all ranks saw since :meth:`arm`, in the plan's order, without tensors that were all zeros.

        Two collectives over the world.
        """
        for hook in self._hooks:
            hook.remove()
        sums = torch.zeros(len(self._readings), len(SUMS), dtype=torch.float64, device=self._device)
        maxima = torch.full((len(self._readings), len(MAXIMA)), -math.inf, dtype=torch.float64, device=self._device)
        if self._found:
            places = torch.tensor([place for place, _ in self._found], device=self._device)
            sums.index_add_(0, places, torch.stack([found.sums for _, found in self._found]))
            found_maxima = torch.stack([found.maxima for _, found in self._found])
            maxima.scatter_reduce_(0, places[:, None].expand_as(found_maxima), found_maxima, "amax")
        self._found = []
        torch.distributed.all_reduce(sums)
        torch.distributed.all_reduce(maxima, op=torch.distributed.ReduceOp.MAX)
        table = zip(self._readings, sums.tolist(), maxima.tolist(), strict=True)
        return [(reading, summary(s, m)) for reading, s, m in table if s[0]]

    @torch.no_grad()
    def _forward_done(self, name: str, module: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Any]) -> None:
        y = output[0]
        # Without a gradient it is validation, or the first of a recomputed layer's two passes.
        if not y.requires_grad or self._seen[name] == self._calls:
            return
        self._seen[name] += 1
        counts = token_counts(module, args)
        group = _amax_group(module)
        self._observe(name, "input", _parts(gemm_input(module, args[0]), counts), group.get("input"))
        if self._seen[name] == 1:
            self._observe(name, "weight", weights(module), None)
        y.register_hook(lambda dy: self._observe(name, "gradient", _parts(dy, counts), group.get("gradient")))

    @torch.no_grad()
    def _observe(
        self,
        name: str,
        tensor: operands.Tensor,
        parts: Sequence[Tensor],
        group: torch.distributed.ProcessGroup | None,
    ) -> None:
        for place in self._places[name, tensor] if parts else ():
            reading = self._readings[place]
            amax = largest_magnitudes(parts, reading.operand, reading.along)
            if group is not None:
                torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
            found = operand_statistics(
                parts, reading.operand, reading.along, amax=amax, limit=self._limit, generator=self._generator
            )
            self._found.append((place, found))


def reads(gemms: Gemms) -> list[tuple[Operand, Along]]:
    """The different ways in which a module's GEMMs read its input (T, K), weight (N, K) and gradient (T, N)."""
    (x, w), (dy, w_back), (dy_back, x_back) = gemms.fprop, gemms.dgrad, gemms.wgrad
    found: list[tuple[Operand, Along]] = [(x, "rows"), (x_back, "columns"), (w, "rows")]
    if not w.is_square:  # those are the same both ways
        found.append((w_back, "columns"))
    return [*found, (dy, "rows"), (dy_back, "columns")]


def is_grouped(module: nn.Module) -> bool:
    """Whether it holds the experts of a layer, here and in Transformer Engine."""
    return hasattr(module, "num_gemms")


def token_counts(module: nn.Module, args: tuple[Any, ...]) -> Sequence[int] | Tensor | None:
    """Each expert's tokens in a call of a grouped linear; None of another module."""
    if not is_grouped(module):
        return None
    counts: Sequence[int] | Tensor = args[1]
    if getattr(module, "takes_ends", False):
        ends = torch.as_tensor(counts)
        return ends.diff(prepend=ends.new_zeros(1))
    return counts


def gemm_input(module: nn.Module, x: Tensor) -> Tensor:
    """What the module multiplies: ``x`` (..., K) itself, or normed in modules that norm first."""
    weight = getattr(module, "layer_norm_weight", None)
    return x if weight is None else rms_norm(x, weight, float(module.eps))  # type: ignore[arg-type]


def weights(module: nn.Module) -> list[Tensor]:
    """(N, K), one for each local expert in grouped linears."""
    names = [f"weight{i}" for i in range(int(module.num_gemms))] if is_grouped(module) else ["weight"]  # type: ignore[arg-type]
    return [module.get_parameter(name) for name in names]


def _parts(x: Tensor, counts: Sequence[int] | Tensor | None) -> list[Tensor]:
    """Matrices (T, K) that have an amax of their own: each expert's tokens, those of experts with any."""
    flat = x.reshape(-1, x.shape[-1])
    if counts is None:
        return [flat]
    sizes = counts.tolist() if isinstance(counts, Tensor) else list(counts)
    return [part for part in flat[: sum(sizes)].split(sizes) if len(part)]  # the last rows may be nobody's


def _amax_group(module: nn.Module) -> dict[operands.Tensor, torch.distributed.ProcessGroup]:
    """The tensor whose tokens are spread over tensor-parallel ranks, and the ranks: its GEMM reads all of them.

    That is the input of a column-parallel and the output's gradient of a row-parallel linear under sequence
    parallelism; Transformer Engine then takes the largest amax of the group (``pytorch/module/linear.py``).
    """
    if is_grouped(module) or not getattr(module, "sequence_parallel", False):
        return {}
    if getattr(module, "explicit_expert_comm", False):  # the caller has gathered
        return {}
    mode = getattr(module, "parallel_mode", None)
    if mode == "column" or isinstance(module, ColumnParallelLinear):
        return {"input": module.tp_group}  # type: ignore[dict-item]
    if mode == "row" or isinstance(module, RowParallelLinear):
        return {"gradient": module.tp_group}  # type: ignore[dict-item]
    return {}
