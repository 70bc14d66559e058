"""What a run will be, before anything starts: for people, and as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import groupby
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.counts import Counts, Layer, count_parameters, flops_per_token
from nemotron3_megatron.plan.features import features, features_table
from nemotron3_megatron.plan.memory_table import memory_data, memory_tables
from nemotron3_megatron.plan.pictures import write_picture
from nemotron3_megatron.plan.precision_shares import format_shares
from nemotron3_megatron.plan.precision_table import notes, precision_table, shares_table
from nemotron3_megatron.plan.tables import new_table
from nemotron3_megatron.plan.time_table import (
    communication_data,
    communication_table,
    flops_data,
    time_data,
    time_table,
)


def as_json(run: Run) -> str:
    """The plan as data (names are stable, see the design)."""
    counts, precision = count_parameters(run.model), run.precision_plan
    first = run.own_stages[0]
    plan = {
        "recipe": run.name,
        "world_size": run.layout.world_size,
        "parameters": {"total": counts.total, "mtp": counts.mtp, "active": counts.active},
        "layers": [asdict(layer) for layer in counts.layers],
        "precision": precision.as_data(),
        "precision_shares": [asdict(share) for share in format_shares(precision, run.model, first.seq_length)],
        "layout": asdict(run.layout),
        "features": [asdict(feature) for feature in features(run)],
        "stages": [asdict(stage) for stage in run.stages],
        "schedule": asdict(run.schedule),
        "tokens_per_step": first.tokens_per_step,
        "steps": run.total_steps,
        "flops_per_token": flops_per_token(run.model, first.seq_length),
        "flops": flops_data(run),
        "communication_bytes": communication_data(run),
        "time": time_data(run),
        "memory_gib": memory_data(run),
        "origins": [asdict(origin) for origin in run.origins],
    }
    return json.dumps(plan, indent=2)


def show(run: Run, console: Console) -> None:
    """Print the plan: what, how large, on what layout, when, and who set which value."""
    counts, precision = count_parameters(run.model), run.precision_plan
    console.print(
        f"[bold]{escape(run.name)}[/bold] on {run.layout.world_size} ranks, into {escape(str(run.run_dir))}\n"
    )
    for table in (
        _parameters(counts),
        layers_table(counts),
        precision_table(precision, run.precision),
        shares_table(run),
    ):
        console.print(table)
    for note in notes(run):
        console.print(f"  {note}", style="dim", highlight=False)
    console.print()
    for table in (
        _layout(run),
        features_table(run),
        schedule_table(run),
        *memory_tables(run),
        communication_table(run),
        time_table(run),
        origins_table(run),
    ):
        console.print(table)


def write_map(run: Run) -> str:
    """Draw ``precision_map.png`` into the run directory; returns where it is, or why it is not."""
    return write_picture("precision map", run.run_dir / "precision_map.png", draw_map, run)


def draw_map(path: Path, run: Run) -> None:
    """Write the PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from nemotron3_megatron.plan.precision_map import draw_precision_map  # Matplotlib

    subtitle = (
        f"precision {run.precision.name}, dtype {run.precision.dtype}; every linear of the model, whatever the layout"
    )
    draw_precision_map(path, run.precision_plan, run.name, subtitle)


def _parameters(counts: Counts) -> Table:
    table = new_table("Parameters", "", "count", "")
    for name, count in (("total", counts.total), ("active per token", counts.active), ("MTP, beside", counts.mtp)):
        table.add_row(name, f"{count:,}", f"{count / 1e9:.2f}B" if count >= 1e9 else f"{count / 1e6:.2f}M")
    return table


def layers_table(counts: Counts) -> Table:
    """Layers of a kind have one size, so one row says it all."""
    table = new_table("Layers", "kind", "layers", "parameters each", "parameters", "at")

    def kind(layer: Layer) -> str:
        return layer.kind

    for name, group in groupby(sorted(counts.layers, key=kind), kind):
        layers = list(group)
        each, indices = layers[0].parameters, ", ".join(str(layer.index) for layer in layers[:12])
        more = f", ... {layers[-1].index}" if len(layers) > 12 else ""
        table.add_row(name, str(len(layers)), f"{each:,}", f"{each * len(layers):,}", indices + more)
    return table


def _layout(run: Run) -> Table:
    layout = run.layout
    table = new_table("Layout", "", "ranks", "")
    note = "sequence parallel" if layout.sequence_parallel else ""
    rows = {
        "TP": (layout.tp, note),
        "PP": (layout.pp, f"{layout.vpp} chunks a rank" if layout.vpp > 1 else ""),
        "CP": (layout.cp, ""),
        "EP": (layout.ep, f"expert tensor parallel {layout.etp}"),
        "DP": (layout.dp, "distributed optimizer" if run.parallel.distributed_optimizer else ""),
    }
    for name, (size, text) in rows.items():
        table.add_row(name, str(size), text)
    table.add_row("pattern", "", layout.hybrid_layer_pattern)
    return table


def schedule_table(run: Run) -> Table:
    """Learning rate and stages."""
    schedule = run.schedule
    title = (
        f"Schedule: lr {schedule.max_lr:g} to {schedule.min_lr:g} ({schedule.decay_style}), warmup"
        f" {schedule.warmup_tokens:,}, tail {schedule.wsd_decay_tokens:,}, decay ends at"
        f" {schedule.decay_end_tokens:,} tokens; stops after step {run.total_steps:,}"
    )
    table = new_table(
        title, "stage", "steps", "tokens", "sequences of", "global batch", "micro-batches", "layout", "lr"
    )
    rates = {rate.first_token: f"{rate.lr:g}" for rate in schedule.constant}
    for stage in run.stages:
        parts, layout = stage.by_shape(), stage.layout or run.layout
        table.add_row(
            stage.name,
            f"{stage.steps:,}",
            f"{stage.tokens:,}",
            _each(f"{part.seq_length:,}" for part in parts),
            _each(f"{part.global_batch_size:,}" for part in parts),
            _each(f"{part.num_microbatches} of {part.micro_batch_size}" for part in parts),
            f"TP{layout.tp} CP{layout.cp} PP{layout.pp} EP{layout.ep} DP{layout.dp}",
            rates.get(stage.first_token, "schedule"),
        )
    return table


def _each(texts: Iterable[str], most: int = 4) -> str:
    """Different texts on a line each; a ramp-up may have very many."""
    different = list(dict.fromkeys(texts))
    return "\n".join(different if len(different) <= most else [*different[: most - 1], "..."])


def origins_table(run: Run) -> Table:
    """Who set which value."""
    table = Table(title="Values that differ from their default", title_justify="left", title_style="bold", box=SIMPLE)
    table.add_column("key", overflow="fold")
    table.add_column("value", overflow="fold", min_width=16)
    table.add_column("default", overflow="fold", style="dim", min_width=8)
    table.add_column("set in", no_wrap=True)
    for origin in run.origins:
        place = origin.place.removeprefix("recipes/")
        table.add_row(origin.key, escape(origin.value), escape(origin.default), escape(place))
    return table
