"""How a training loop is timed: a process a case, warm-up steps, then all steps between two synchronisations."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from exchanged import exchanged
from slices import Place, open_gpu, random_batches
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.plan.communication import communication
from nemotron3_megatron.plan.counts import flops_per_token
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.garbage import collected_between_steps
from nemotron3_megatron.train.step import train_step

WARMUP_STEPS = 4
Step = Callable[[list[MicroBatch]], Any]
"""One optimizer step -> the loss, a number or a tensor of one."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What one process measured."""

    seconds: float
    """Of a timed step, on average."""
    first_s: float
    """From the start of building to the end of the first step."""
    loss: float
    """Of the last step."""
    peak_gib: float
    backend: str
    """Of the precision plan."""
    expert_bytes: dict[str, int]
    """Moved among expert-parallel ranks in the first step, by operation (``exchanged``)."""


def time_steps(
    run: Run,
    loop: str,
    steps: int,
    balanced: bool,
    report: Path | None = None,
    warmup: int = WARMUP_STEPS,
    place: Place | None = None,
) -> Timing:
    """Build ``run`` in this process and time its steps.

    Args:
        run: what to train, on random tokens.
        loop: ``ours``, or ``peer`` (peer.py).
        steps: timed, after the warm-up.
        balanced: every expert gets as many tokens, as published figures have it; else what fresh weights route.
        report: file for the kernels of two more steps.
        warmup: steps before.
        place: this process among several; None: one GPU.
    """
    from megatron.core.parallel_state import get_expert_model_parallel_group  # after slices

    place = place or Place()
    started = time.perf_counter()
    platform = open_gpu(place)
    step, backend, release = _step_of(loop, run, platform, balanced)
    batches = [random_batches(run, number, place.rank) for number in range(warmup + steps)]
    with exchanged(get_expert_model_parallel_group()) as moved:
        step(batches[0])
    platform.synchronize()
    first = time.perf_counter() - started
    with collected_between_steps() if loop == "ours" else nullcontext():
        for batch in batches[1:warmup]:
            step(batch)
        platform.synchronize()
        begin = time.perf_counter()
        for batch in batches[warmup:]:
            loss = step(batch)
        platform.synchronize()
        seconds = (time.perf_counter() - begin) / steps
        peak = torch.cuda.max_memory_allocated() / 2**30
        if report is not None:
            _profile(step, batches[-2:], platform, report)
    release()
    torch.distributed.destroy_process_group()
    return Timing(seconds, first, float(loss), peak, backend, dict(moved))


def summary(run: Run, turns: list[Timing]) -> dict[str, Any]:
    """Means over turns; ``run`` gives tokens and model FLOPs."""
    seconds = statistics.mean(turn.seconds for turn in turns)
    stage = run.stages[0]
    rate = stage.tokens_per_step / seconds / run.layout.world_size
    return {
        "step_ms": 1e3 * seconds,
        "turns_ms": [1e3 * turn.seconds for turn in turns],
        "tokens_per_s_per_gpu": rate,
        "model_tflops": rate * flops_per_token(run.model, stage.seq_length) / 1e12,
        "first_s": [turn.first_s for turn in turns],
        "peak_gib": max(turn.peak_gib for turn in turns),
        "loss": turns[0].loss,
        "backend": turns[0].backend,
        "expert_bytes": turns[0].expert_bytes,
        "planned_expert_bytes": _planned(run),
    }


def _planned(run: Run) -> dict[str, float]:
    """What the plan says that ``expert_bytes`` are."""
    planned: Counter[str] = Counter()
    for each in communication(run, 0):
        if each.group.name == "ep":
            planned[each.operation] += int(each.bytes)
    return dict(planned)


def _step_of(loop: str, run: Run, platform: Platform, balanced: bool) -> tuple[Step, str, Callable[[], None]]:
    """The loop's step, the backend of its precision plan, and what to call before process groups are stopped."""
    if loop == "peer":
        from peer import Peer

        return Peer(run, balanced).step, "none", lambda: None
    from megatron.core.transformer.moe.router import TopKRouter

    trainer = build_trainer(run, platform, start_groups(run, platform))
    for module in (module for chunk in trainer.chunks for module in chunk.modules() if isinstance(module, TopKRouter)):
        module.config.moe_router_force_load_balancing = balanced
    return lambda batches: train_step(trainer, batches, run.stages[0], 1e-4).losses[0], trainer.backend, trainer.release


def _profile(step: Step, batches: Sequence[list[MicroBatch]], platform: Platform, report: Path) -> None:
    """Kernels of some steps by time, and where the GPU had nothing to do between their first and their last."""
    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
        for batch in batches:
            step(batch)
        platform.synchronize()
    kernels = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in profiler.events() or []
        if e.device_type == DeviceType.CUDA and e.time_range.end > e.time_range.start
    )
    gaps: list[tuple[float, str]] = []
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    reached, before = kernels[0][0], ""
    for start, end, name in kernels:
        if start > reached:
            gaps.append((start - reached, f"{before[:60]} .. {name[:60]}"))
        if end > reached:
            reached, before = end, name
        times[name] += end - start
        counts[name] += 1
    idle, whole = sum(length for length, _ in gaps), reached - kernels[0][0]
    lines = [f"{len(batches)} steps, {len(kernels)} kernels, {whole / 1e3:.1f} ms, idle {idle / whole:.1%}"]
    lines += [f"{time_us / 1e3:9.2f} ms {counts[name]:5d}  {name[:150]}" for name, time_us in times.most_common(50)]
    lines += [f"{length / 1e3:9.2f} ms idle  {where}" for length, where in sorted(gaps, reverse=True)[:30]]
    report.parent.mkdir(parents=True, exist_ok=True)
    report.write_text("\n".join(lines) + "\n")
