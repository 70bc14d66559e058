"""The plan's communication and time for people."""

from __future__ import annotations

from dataclasses import asdict

from rich.table import Table

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.communication import communication, latent_reduction
from nemotron3_megatron.plan.flops import work_of
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.roofline import collective_seconds, members_in_domain
from nemotron3_megatron.plan.tables import new_table
from nemotron3_megatron.plan.time import estimate


def flops_data(run: Run) -> list[dict[str, object]]:
    """One record a role, format and direction: operations a token of the first stage."""
    return [asdict(each) for each in work_of(run)]


def time_data(run: Run) -> dict[str, object]:
    """The estimate, with the parts of a step in seconds."""
    return asdict(estimate(run, gpu_of(run)))


def communication_data(run: Run) -> list[dict[str, object]]:
    """One record a collective and pipeline rank: bytes that a rank sends in an optimizer step of the first stage."""
    return [
        {
            "pipeline_rank": rank,
            "what": each.what,
            "operation": each.operation,
            "group": each.group.name,
            "ranks": each.group.size,
            "bytes": round(each.bytes),
        }
        for rank in range(run.layout.pp)
        for each in communication(run, rank)
    ]


def communication_table(run: Run) -> Table:
    """What the pipeline rank that sends most sends in a step."""
    gpu = gpu_of(run)
    ranks = [communication(run, rank) for rank in range(run.layout.pp)]
    busiest = max(range(len(ranks)), key=lambda rank: sum(each.bytes for each in ranks[rank]))
    of_rank = f", pipeline rank {busiest}" if len(ranks) > 1 else ""
    title = f"Communication of a step, a rank{of_rank} ({gpu.name.upper()}, {gpu.nvlink_domain} GPUs on NVLink)"
    if run.model.moe_latent_size and run.layout.ep > 1:
        title += f"; latent experts exchange {latent_reduction(run.model):g} times less than standard ones"
    table = new_table(title, "what", "operation", "ranks", "sent", "seconds", "over")
    for each in ranks[busiest]:
        near = members_in_domain(each.group, gpu) == each.group.size
        sent, seconds = f"{each.bytes / 1e9:,.3f} GB", f"{collective_seconds(each, gpu):.3f}"
        size = f"{each.group.size} {each.group.name}"
        table.add_row(each.what, each.operation, size, sent, seconds, "NVLink" if near else "network")
    return table


def time_table(run: Run) -> Table:
    """Where a step's time goes by the estimate, and what follows for the whole run."""
    guess = estimate(run, gpu_of(run))
    step = guess.step
    title = (
        f"Time on {guess.gpu.upper()} (estimate, see docs/planning.md): {guess.step_seconds:.3g} s a step,"
        f" {guess.tokens_per_second_per_gpu:,.0f} tokens/s and {guess.tflops_per_gpu:,.0f} TFLOP/s a GPU,"
        f" {guess.mfu:.0%} of the BF16 peak; {guess.days:,.3g} days, {guess.gpu_hours:,.0f} GPU-hours"
    )
    table = new_table(title, "part", "seconds", "share", "")
    parts = (
        ("planned linears", step.linears, "three GEMMs each, quantising"),
        ("everything else in layers", step.other, "scores, scans, norms, routing, output layer, launches"),
        ("communication in layers", step.layer_communication, "TP, CP, EP, PP; none of it hidden"),
        ("pipeline bubble", step.bubble, "(pp - 1) / (micro-batches * vpp)"),
        ("gradients, parameters", step.step_communication, "what overlap leaves"),
        ("optimizer", step.optimizer, ""),
    )
    for name, seconds, note in parts:
        table.add_row(name, f"{seconds:.4f}", f"{seconds / step.total:.1%}", note)
    return table
