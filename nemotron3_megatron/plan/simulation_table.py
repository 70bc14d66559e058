"""What a simulation found, for people and as one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.memory import GIB
from nemotron3_megatron.plan.simulation import RankReport, Simulation
from nemotron3_megatron.plan.tables import new_table

_SHOWN_GROUPS = ("tp", "cp", "dp", "pp", "ep", "expt_tp", "expt_dp")
"""Megatron-Core's names; JSON has every group."""


def as_json(run: Run, simulation: Simulation) -> str:
    """The simulation as data."""
    data = {
        "recipe": run.name,
        "world_size": run.layout.world_size,
        "is_sound": simulation.is_sound,
        "ranks": [{"is_sound": report.is_sound, **asdict(report)} for report in simulation.ranks],
        "differences": simulation.differences,
    }
    return json.dumps(data, indent=2)


def show(run: Run, simulation: Simulation, console: Console) -> None:
    """Print groups, contents and bytes of each rank, one rank's tensors, and all that is not as planned."""
    whole = [report for report in simulation.ranks if report.groups]
    if whole:
        console.print(_groups(run, whole))
    built = [report for report in whole if report.held is not None]
    if built:
        console.print(_contents(run, built))
        console.print(_tensors(built[-1]))
    for report in simulation.ranks:
        took = f"{sum(report.seconds.values()):.1f} s, {report.peak_bytes / GIB:.2f} GiB"
        console.print(f"rank {report.rank}: {report.step or 'no step'} ({took})", highlight=False)
        for text in filter(None, (*report.differences, report.error)):
            console.print(f"  [red]{escape(text)}[/]", highlight=False)
    for text in simulation.differences:
        console.print(f"[red]{escape(text)}[/]", highlight=False)
    verdict = "[green]As planned, byte for byte.[/]" if simulation.is_sound else "[red]Not as planned.[/]"
    console.print(verdict)


def _groups(run: Run, reports: list[RankReport]) -> Table:
    title = f"{run.name}: {len(reports)} of {run.layout.world_size:,} ranks, simulated (place in each process group)"
    table = new_table(escape(title), "rank", *_SHOWN_GROUPS, "")
    for report in reports:
        places = [report.groups[name] for name in _SHOWN_GROUPS]
        table.add_row(f"{report.rank:,}", *(f"{group.place} of {group.size}" for group in places))
    return table


def _contents(run: Run, reports: list[RankReport]) -> Table:
    columns = ("rank", "layers", "experts", "parameters", "weights", "gradients", "optimizer", "")
    table = new_table("What these ranks hold: GiB of real tensors", *columns)
    for report in reports:
        layers = " and ".join(_run_of(run, numbers) for numbers in report.layers)
        experts = "none" if report.experts is None else f"{report.experts[0]}-{report.experts[1]}"
        held = report.held
        assert held is not None
        sizes = (f"{size / GIB:.3f}" for size in (held.weights, held.gradients, held.optimizer))
        as_planned = "as planned" if held == report.planned else "[red]not as planned[/]"
        table.add_row(f"{report.rank:,}", escape(layers), experts, f"{report.parameters:,}", *sizes, as_planned)
    return table


def _run_of(run: Run, numbers: tuple[int, ...]) -> str:
    """Numbers of a chunk's layers, with their symbols where they are few."""
    if not numbers:
        return "none"
    symbols = "".join(run.model.pattern[number] for number in numbers)
    return f"{numbers[0]}-{numbers[-1]}" + (f" {symbols}" if len(symbols) <= 16 else "")


def _tensors(report: RankReport) -> Table:
    table = new_table(f"Tensors of rank {report.rank:,} as checkpoints name them", "name", "names", "here", "whole", "")
    for part in report.parts:
        here = f"{part.tensors // part.names} x " if part.tensors > part.names else ""
        shapes = (here + "x".join(map(str, part.shape)), "x".join(map(str, part.whole)))
        table.add_row(part.name, str(part.names), *shapes, part.dtype)
    return table
