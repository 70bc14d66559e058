"""``nemotron3 plan``: the resolved run, a search of layouts, a simulation of ranks, a page."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from nemotron3_megatron.config import compose, planned_world, resolve


def plan_main(overrides: list[str], as_json: bool, width: int | None) -> int:
    """Print the resolved run and draw its pictures.

    Args:
        overrides: recipe, and keys of it.
        as_json: print JSON.
        width: columns of tables; None: the terminal's.
    """
    from nemotron3_megatron.plan import report
    from nemotron3_megatron.plan.memory_table import write_memory_chart

    recipe, origins = compose(overrides)
    run = resolve(recipe, planned_world(recipe), origins)
    if as_json:
        sys.stdout.write(report.as_json(run) + "\n")
    else:
        report.show(run, Console(width=width))
    sys.stdout.flush()
    sys.stderr.write(f"{report.write_map(run)}\n{write_memory_chart(run)}\n")
    return 0


def search_main(overrides: list[str], as_json: bool, width: int | None) -> int:
    """Print the layouts that fit, by their estimated speed; arguments as :func:`plan_main`'s."""
    from nemotron3_megatron.plan import search_table
    from nemotron3_megatron.plan.search import search

    named = [f"world_size={text.removeprefix('gpus=')}" if text.startswith("gpus=") else text for text in overrides]
    recipe, _ = compose(named)
    found = search(recipe, planned_world(recipe))
    if as_json:
        sys.stdout.write(search_table.as_json(recipe, found) + "\n")
    else:
        search_table.show(recipe, found, Console(width=width))
    return 0


def simulate_main(overrides: list[str], ranks: str | None, as_json: bool, width: int | None) -> int:
    """Build ranks of the run without devices and print what they hold; exit status 1: one failed or is not as planned.

    Args:
        overrides: as :func:`plan_main`'s, like ``as_json`` and ``width``.
        ranks: which (``simulation.parse_ranks``); None: ``simulation.sampled_ranks``.
        as_json: see there.
        width: see there.
    """
    from nemotron3_megatron.plan import simulation_table
    from nemotron3_megatron.plan.simulation import parse_ranks, sampled_ranks, simulate_ranks

    recipe, origins = compose(overrides)
    run = resolve(recipe, planned_world(recipe), origins)
    chosen = sampled_ranks(run.layout) if ranks is None else parse_ranks(ranks, run.layout)
    simulation = simulate_ranks(run, chosen)
    if as_json:
        sys.stdout.write(simulation_table.as_json(run, simulation) + "\n")
    else:
        simulation_table.show(run, simulation, Console(width=width))
    return 0 if simulation.is_sound else 1


def write_plan_page(overrides: list[str], file: str) -> None:
    """Write the resolved run as an HTML page."""
    from nemotron3_megatron.plan.html import write_page

    recipe, origins = compose(overrides)
    write_page(Path(file), resolve(recipe, planned_world(recipe), origins))
    sys.stderr.write(f"page: {file}\n")
