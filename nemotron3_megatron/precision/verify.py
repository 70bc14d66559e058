"""The plan against what is installed in the modules that were really built, on every rank."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import nn

from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.operands import Gemms
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan

_SHOWN = 40


class PrecisionMismatchError(RuntimeError):
    """The built model would not compute what the plan says; the message is a table."""


@dataclass(frozen=True, slots=True)
class Difference:
    """One module that does not follow the plan."""

    module: str
    planned: str
    found: str
    rank: int | None
    """None: on no rank."""


def verify(
    plan: PrecisionPlan, chunks: Iterable[nn.Module], installed_gemms: Callable[[nn.Module], Gemms | None]
) -> None:
    """Compare plan and modules on all ranks; a collective over the world.

    Args:
        plan: of the whole model.
        chunks: this rank's.
        installed_gemms: what a module will do, None if it quantises nothing.

    Raises:
        PrecisionMismatchError: on every rank alike, if any module of any rank differs, is not in the plan, or is
            planned and exists nowhere.
    """
    modules = [pair for chunk in chunks for pair in named_linears(chunk).items()]
    found = [(name, installed_gemms(module)) for name, module in modules]
    rank = torch.distributed.get_rank()
    everyone: list[tuple[list[Difference], list[str]]] = [([], [])] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, (differences(plan, found, rank), [name for name, _ in found]))
    wrong = [difference for theirs, _ in everyone for difference in theirs]
    built = {name for _, names in everyone for name in names}
    absent = [Difference(row.module, row.format, "not built", None) for row in plan.rows if row.module not in built]
    if wrong or absent:
        raise PrecisionMismatchError(_table([*wrong, *absent], len(plan.rows)))


def differences(plan: PrecisionPlan, found: Iterable[tuple[str, Gemms | None]], rank: int) -> list[Difference]:
    """Modules of one rank that do not follow the plan."""
    rows = {row.module: row for row in plan.rows}
    result = []
    for name, gemms in found:
        row = rows.get(name)
        if row is None:
            result.append(Difference(name, "not in the plan", _brief(gemms), rank))
        elif gemms != _planned(row):
            result.append(Difference(name, _brief(_planned(row)), _brief(gemms), rank))
    return result


def _planned(row: PlanRow) -> Gemms | None:
    return None if row.format == "bf16" else row.gemms


def _brief(gemms: Gemms | None) -> str:
    """Formats by GEMM, and what is special about each operand."""
    if gemms is None:
        return "bf16"
    parts = []
    for name in ("fprop", "dgrad", "wgrad"):
        operands = []
        for operand in getattr(gemms, name):
            block = "" if operand.block is None else "x".join(map(str, operand.block))
            marks = ["sr"] * (operand.rounding == "stochastic") + ["rht"] * (operand.hadamard is not None)
            operands.append(" ".join([operand.format, block, *marks]))
        parts.append(f"{name}: {' · '.join(operands)}")
    return "\n".join(parts)


def _table(wrong: list[Difference], planned: int) -> str:
    table = Table("rank", "module", "plan", "installed", box=SIMPLE, show_lines=True)
    # The same module may stand on many ranks: say it once.
    ranks = Counter((d.module, d.planned, d.found) for d in wrong)
    first = {(d.module, d.planned, d.found): d.rank for d in reversed(wrong)}
    for key in list(ranks)[:_SHOWN]:
        more = f" and {ranks[key] - 1} more" if ranks[key] > 1 else ""
        table.add_row("none" if first[key] is None else f"{first[key]}{more}", *key)
    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(table)
    rest = f"\n... and {len(ranks) - _SHOWN} more modules" if len(ranks) > _SHOWN else ""
    count = "1 module does" if len(ranks) == 1 else f"{len(ranks)} modules do"
    title = f"{count} not follow the precision plan of {planned}"
    return f"{title}\n{capture.get()}{rest}"
