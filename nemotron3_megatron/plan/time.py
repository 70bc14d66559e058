"""How long a step and the whole run take: a roofline estimate, calibrated by what NVIDIA publishes."""

from __future__ import annotations

from dataclasses import dataclass

from nemotron3_megatron.accelerators import Gpu
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.plan.communication import communication
from nemotron3_megatron.plan.counts import flops_per_token
from nemotron3_megatron.plan.roofline import (
    HIDDEN_SHARE,
    collective_seconds,
    linear_seconds,
    optimizer_seconds,
    other_seconds,
)
from nemotron3_megatron.plan.segments import segments


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of one optimizer step on the pipeline rank that works longest."""

    linears: float
    other: float
    """Attention scores, Mamba scans, output layer, norms, routing, launches."""
    layer_communication: float
    """In the path of every micro-batch; nothing of it is taken as hidden."""
    bubble: float
    step_communication: float
    """What is left of gradients' and parameters' traffic beside computation."""
    optimizer: float

    @property
    def total(self) -> float:
        """Seconds from step to step."""
        busy = self.linears + self.other + self.layer_communication
        return busy + self.bubble + self.step_communication + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """Of a whole run."""

    gpu: str
    step: StepTime
    """Of the first stage of the run's layout."""
    step_seconds: float
    tokens_per_second_per_gpu: float
    tflops_per_gpu: float
    """10^12 model operations a second (``flops_per_token``: nothing recomputed)."""
    mfu: float
    """Share of the GPU's dense BF16 peak, whatever the formats: one yardstick for all precisions."""
    days: float
    """All stages, without restarts, evaluation and checkpoints."""
    gpu_hours: float


def estimate(run: Run, gpu: Gpu) -> Estimate:
    """Estimate a run on this GPU."""
    first = run.own_stages[0]
    step = step_time(run, gpu, first)
    rate = first.tokens_per_step / step.total / run.layout.world_size
    flops = rate * flops_per_token(run.model, first.seq_length)
    whole = rank_seconds = 0.0
    for stage in run.stages:
        there = run.for_stage(stage)
        for part in stage.until(run.total_steps).by_shape():
            seconds = part.steps * step_time(there, gpu, part).total
            whole, rank_seconds = whole + seconds, rank_seconds + seconds * there.layout.world_size
    return Estimate(
        gpu=gpu.name,
        step=step,
        step_seconds=step.total,
        tokens_per_second_per_gpu=rate,
        tflops_per_gpu=flops / 1e12,
        mfu=flops / gpu.bf16,
        days=whole / 86400,
        gpu_hours=rank_seconds / 3600,
    )


def step_time(run: Run, gpu: Gpu, stage: Stage) -> StepTime:
    """One optimizer step of a stage; the pipeline goes at the pace of its slowest rank."""
    return max((rank_time(run, gpu, stage, rank) for rank in range(run.layout.pp)), key=lambda time: time.total)


def rank_time(run: Run, gpu: Gpu, stage: Stage, rank: int) -> StepTime:
    """One optimizer step of a stage, were all pipeline ranks as slow as this one."""
    segment, layout, parallel = segments(run)[rank], run.layout, run.parallel
    micro = stage.num_microbatches
    linears = micro * linear_seconds(run, gpu, stage, segment)
    other = micro * other_seconds(run, gpu, stage, segment)
    collectives = communication(run, rank, stage)
    inside = sum(collective_seconds(each, gpu) for each in collectives if each.per == "layer")
    beside = 0.0
    for each in collectives:
        if each.per == "step":
            gathers = each.operation == "all-gather"
            overlapped = parallel.overlap_param_gather if gathers else parallel.overlap_grad_reduce
            alone = each.group.name in ("tp", "embedding") or not overlapped
            beside += collective_seconds(each, gpu) * (1 if alone else 1 - HIDDEN_SHARE)
    busy = linears + other + inside
    return StepTime(
        linears=linears,
        other=other,
        layer_communication=inside,
        bubble=busy * (layout.pp - 1) / (micro * layout.vpp),
        step_communication=beside,
        optimizer=optimizer_seconds(run, gpu, segment),
    )
