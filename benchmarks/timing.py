"""How a training loop is timed: a process a case, warm-up steps, then each step by itself."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from slices import Place, open_gpu, random_batches
from torch.profiler import ProfilerActivity, profile

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.plan.counts import flops_per_token
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.step import train_step

WARMUP_STEPS = 4
Step = Callable[[list[MicroBatch]], float]


@dataclass(frozen=True, slots=True)
class Timing:
    """What one process measured."""

    seconds: list[float]
    """Of each timed step."""
    first_s: float
    """From the start of building to the end of the first step."""
    loss: float
    """Of the last step."""
    peak_gib: float
    backend: str
    """Of the precision plan."""


def time_steps(
    run: Run, loop: str, steps: int, balanced: bool, report: Path | None = None, place: Place | None = None
) -> Timing:
    """Build ``run`` in this process and time its steps.

    Args:
        run: what to train, on random tokens.
        loop: ``ours``, or ``peer`` (peer.py).
        steps: timed, after WARMUP_STEPS.
        balanced: every expert gets as many tokens, as published figures have it; else what fresh weights route.
        report: file for the kernels of one more step.
        place: this process among several; None: one GPU.
    """
    place = place or Place()
    started = time.perf_counter()
    seconds: list[float] = []
    platform = open_gpu(place)
    step, backend = _step_of(loop, run, platform, balanced)
    for number in range(WARMUP_STEPS + steps):
        batches = random_batches(run, number, place.rank)
        platform.synchronize()
        begin = time.perf_counter()
        loss = step(batches)
        platform.synchronize()
        seconds.append(time.perf_counter() - begin)
        if number == 0:
            first = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30
    if report is not None:
        _profile(step, random_batches(run, 99, place.rank), platform, report)
    torch.distributed.destroy_process_group()
    return Timing(seconds[WARMUP_STEPS:], first, loss, peak, backend)


def summary(run: Run, turns: list[Timing]) -> dict[str, Any]:
    """Medians over all turns' steps; ``run`` gives tokens and model FLOPs."""
    seconds = statistics.median(second for turn in turns for second in turn.seconds)
    stage = run.stages[0]
    rate = stage.tokens_per_step / seconds / run.layout.world_size
    return {
        "step_ms": 1e3 * seconds,
        "turns_ms": [1e3 * statistics.median(turn.seconds) for turn in turns],
        "tokens_per_s_per_gpu": rate,
        "model_tflops": rate * flops_per_token(run.model, stage.seq_length) / 1e12,
        "first_s": [turn.first_s for turn in turns],
        "peak_gib": max(turn.peak_gib for turn in turns),
        "loss": turns[0].loss,
        "backend": turns[0].backend,
    }


def _step_of(loop: str, run: Run, platform: Platform, balanced: bool) -> tuple[Step, str]:
    if loop == "peer":
        from peer import Peer

        return Peer(run, balanced).step, "none"
    from megatron.core.transformer.moe.router import TopKRouter

    trainer = build_trainer(run, platform, start_groups(run, platform))
    for module in (module for chunk in trainer.chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
        module.config.moe_router_force_load_balancing = balanced
    return lambda batches: train_step(trainer, batches, run.stages[0], 1e-4).losses[0], trainer.backend


def _profile(step: Step, batches: list[MicroBatch], platform: Platform, report: Path) -> None:
    """Kernels of one step by time, and the GPU's idle share between its first and its last."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        step(batches)
        platform.synchronize()
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events() or []
        if e.device_type == torch.autograd.DeviceType.CUDA
    )
    busy, reached = 0.0, kernels[0][0]
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for start, end, name in kernels:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
        times[name] += end - start
        counts[name] += 1
    whole = reached - kernels[0][0]
    lines = [f"{len(kernels)} kernels, busy {busy / 1e3:.1f} of {whole / 1e3:.1f} ms, idle {1 - busy / whole:.1%}"]
    lines += [f"{time_us / 1e3:9.2f} ms {counts[name]:5d}  {name[:150]}" for name, time_us in times.most_common(60)]
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(lines) + "\n")
