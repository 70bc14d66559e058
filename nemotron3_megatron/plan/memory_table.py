"""The memory plan for people and as data."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from nemotron3_megatron.accelerators import GB200, GB300, H100, H200
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.memory import GIB, TERMS, Memory, MemoryPlan, memory_plan
from nemotron3_megatron.plan.memory_advice import Advice, advise
from nemotron3_megatron.plan.pictures import write_picture
from nemotron3_megatron.plan.tables import new_table

_TITLES = {"quantised_weights": "quantised"}


def memory_data(run: Run) -> dict[str, float]:
    """GiB of every term on the fullest rank, and on its host while it saves a checkpoint."""
    plan = memory_plan(run)
    return {**plan.fullest.in_gib(), "checkpoint_host": plan.checkpoint_host / GIB}


def write_memory_chart(run: Run) -> str:
    """Draw ``memory.png`` into the run directory; returns where it is, or why it is not."""
    return write_picture("memory chart", run.run_dir / "memory.png", draw_memory_chart, run)


def draw_memory_chart(path: Path, run: Run) -> None:
    """Write the PNG.

    Raises:
        OSError: the file cannot be written.
    """
    from nemotron3_megatron.plan.memory_chart import draw_memory  # Matplotlib

    plan = memory_plan(run)
    stage, layout = plan.stage, run.layout
    subtitle = (
        f"{layout.world_size:,} GPUs: TP {layout.tp}, PP {layout.pp}, CP {layout.cp}, EP {layout.ep}, DP {layout.dp};"
        f" stage {stage.name}: micro-batch {stage.micro_batch_size} of {stage.seq_length:,} tokens;"
        f" recompute {run.parallel.recompute}"
    )
    draw_memory(path, plan, (H100, H200, GB200, GB300), run.name, subtitle)


def memory_tables(run: Run) -> Iterator[Table]:
    """Terms by pipeline rank; then, on which GPUs that fits, and what would help on the others."""
    plan = memory_plan(run)
    yield _terms(plan)
    yield _fits(run, advise(run))


def _terms(plan: MemoryPlan) -> Table:
    names = [_TITLES.get(name, name) for name in TERMS]
    host = f"{plan.checkpoint_host / GIB:.2f} GiB of CPU memory a rank while a checkpoint is saved"
    title = f"Memory: GiB of the fullest GPU, stage {plan.stage.name} ({host})"
    table = new_table(title, "pipeline rank", *names, "total")
    for label, memory in _rows(plan):
        terms = (f"{getattr(memory, name) / GIB:.2f}" for name in TERMS)
        table.add_row(label, *terms, f"[bold]{memory.total / GIB:.2f}[/]")
    return table


def _rows(plan: MemoryPlan) -> Iterator[tuple[str, Memory]]:
    """Neighbours that are alike in one row."""
    start = 0
    for rank, memory in enumerate(plan.ranks):
        if rank + 1 == len(plan.ranks) or plan.ranks[rank + 1] != memory:
            label = str(rank) if start == rank else f"{start}-{rank}"
            yield label + (" (fullest)" if start <= plan.fullest_rank <= rank else ""), memory
            start = rank + 1


def _fits(run: Run, advices: tuple[Advice, ...]) -> Table:
    table = new_table("Fits", "GPU", "GiB for torch", "needs", "as it is, or with the cheapest change")
    for advice in advices:
        name = advice.gpu.name + (" (planned)" if advice.gpu == gpu_of(run) else "")
        needs = "" if advice.total_gib is None else f"{advice.total_gib:.1f}"
        if advice.changes is None:
            text = "[red]no[/], nor with recomputation, smaller micro-batches or up to 8 times more of EP, TP or PP"
        elif advice.changes:
            text = escape("with " + " ".join(change.text for change in advice.changes))
        else:
            text = "[green]yes[/]"
        table.add_row(name, f"{advice.limit_gib:.1f}", needs, text)
    return table
