"""What a search found, for people and as one JSON object."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.plan.search import RECOMPUTE, Choice, Found, Search
from nemotron3_megatron.plan.tables import new_table


def as_json(recipe: Recipe, found: Search) -> str:
    """The search as data."""
    data = {
        "recipe": recipe.name,
        "world_size": found.world_size,
        "gpu": found.gpu.name,
        "limit_gib": found.limit_gib,
        "legal": found.legal,
        "weights_do_not_fit": found.hopeless,
        "memory_plans": found.planned,
        "best": [_record(recipe, each) for each in found.best],
        "suspects": [{"layout": each.choice.text, "reason": each.reason} for each in found.suspects],
    }
    return json.dumps(data, indent=2)


def show(recipe: Recipe, found: Search, console: Console) -> None:
    """Print the best, how to ask for the first of them, and why the usual ones are not among them."""
    console.print(_best(recipe, found))
    if found.best:
        console.print(f"The first, for plan and train.py:\n  {escape(overrides(recipe, found.best[0].choice))}\n")
    else:
        console.print("[red]None of them fits[/], whatever is recomputed.\n")
    table = new_table("The usual suspects (micro-batch 1, nothing recomputed)", "layout", "")
    for each in found.suspects:
        table.add_row(each.choice.text, escape(each.reason))
    console.print(table)


def overrides(recipe: Recipe, choice: Choice) -> str:
    """What a user writes for this layout, whatever layout the recipe has."""
    mode, modules = RECOMPUTE[choice.recompute]
    sizes = " ".join(f"parallel.{name}={getattr(choice, name)}" for name in ("tp", "pp", "vpp", "cp", "ep"))
    recompute = f"parallel.recompute={mode} parallel.recompute_modules=[{','.join(modules)}]"
    batches = " ".join(f"stages.{name}.micro_batch_size={choice.micro_batch_size}" for name in recipe.stages)
    return f"{sizes} parallel.etp=1 parallel.sequence_parallel=null {recompute} {batches}"


def _record(recipe: Recipe, found: Found) -> dict[str, object]:
    mode, modules = RECOMPUTE[found.choice.recompute]
    return {
        **asdict(found.choice),
        "recompute": mode,
        "recompute_modules": modules,
        "memory_gib": found.memory_gib,
        "step_seconds": found.estimate.step_seconds,
        "tokens_per_second_per_gpu": found.estimate.tokens_per_second_per_gpu,
        "mfu": found.estimate.mfu,
        "overrides": overrides(recipe, found.choice),
    }


def _best(recipe: Recipe, found: Search) -> Table:
    title = (
        f"{recipe.name} on {found.world_size:,} {found.gpu.name.upper()} with {found.limit_gib:.1f} GiB for torch:"
        f" {found.legal:,} legal layouts and micro-batches; the weights and optimizer of {found.hopeless:,} do not fit"
    )
    columns = ("layout", "micro-batch", "recompute", "GiB", "s a step", "tokens/s a GPU", "MFU", "")
    table = new_table(escape(title), *columns)
    for each in found.best:
        guess = each.estimate
        table.add_row(
            each.choice.text,
            str(each.choice.micro_batch_size),
            each.choice.recompute_text,
            f"{each.memory_gib:.1f}",
            f"{guess.step_seconds:.4g}",
            f"{guess.tokens_per_second_per_gpu:,.0f}",
            f"{guess.mfu:.1%}",
        )
    return table
