"""Our loop against a plain Megatron-Core loop with stock settings, interleaved, on one GPU.

    python benchmarks/throughput.py [--slices nano,super] [--steps 10] [--json] [--profile DIR]

Each case is built, warmed up and timed in a process of its own, twice over (ours, peer, ours, peer). MFU is measured
against the matmul rate of this GPU, taken in the same run. ``--profile`` writes the kernels of one step by time, and
how long the GPU had nothing to do.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from slices import SLICES, in_fresh_process, open_gpu, random_batches, slice_run
from torch.profiler import ProfilerActivity, profile

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.plan.counts import flops_per_token
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.step import train_step

TURNS = 2
WARMUP_STEPS = 4
Step = Callable[[list[MicroBatch]], float]


def main() -> None:
    """Time all slices and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", default="nano,super", help=f"of {', '.join(SLICES)}")
    parser.add_argument("--loops", default="ours,peer")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of one step")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides")
    options = parser.parse_args()
    device, peak = in_fresh_process(matmul_rate)
    results = {}
    for name in options.slices.split(","):
        run = slice_run(name, options.overrides)
        turns: dict[str, list[dict[str, Any]]] = {loop: [] for loop in options.loops.split(",")}
        for turn in range(options.turns):
            for loop, measured in turns.items():
                folder = options.profile if turn == 0 else None
                report = folder and folder / f"{name}_{loop}.txt"
                measured.append(in_fresh_process(_time, run, loop, options.steps, report))
        results[name] = {loop: _summary(run, measured, peak) for loop, measured in turns.items()}
    if options.json:
        print(json.dumps({"device": device, "matmul_flops": peak, "slices": results}, indent=2))
    else:
        _show(results, device, peak)


def matmul_rate(size: int = 8192) -> tuple[str, float]:
    """The GPU's name, and FLOP/s of a BF16 matmul, best of several batches."""
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            a @ b
        end.record()
        end.synchronize()
        best = min(best, start.elapsed_time(end) / 10)
    return torch.cuda.get_device_name(), 2 * size**3 / (best * 1e-3)


def _step_of(loop: str, run: Run, platform: Platform) -> Step:
    if loop == "peer":
        from peer import Peer

        return Peer(run).step
    trainer = build_trainer(run, platform, start_groups(run, platform))
    return lambda batches: train_step(trainer, batches, run.stages[0], 1e-4).losses[0]


def _time(run: Run, loop: str, steps: int, report: Path | None) -> dict[str, Any]:
    started = time.perf_counter()
    seconds: list[float] = []
    platform = open_gpu()
    step = _step_of(loop, run, platform)
    for number in range(WARMUP_STEPS + steps):
        batches = random_batches(run, number)
        platform.synchronize()
        begin = time.perf_counter()
        loss = step(batches)
        platform.synchronize()
        seconds.append(time.perf_counter() - begin)
        if number == 0:
            first = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated() / 2**30
    if report is not None:
        _profile(step, random_batches(run, 99), platform, report)
    return {"seconds": seconds[WARMUP_STEPS:], "first_s": first, "loss": loss, "peak_gib": peak}


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


def _summary(run: Run, turns: list[dict[str, Any]], peak: float) -> dict[str, Any]:
    seconds = statistics.median(second for turn in turns for second in turn["seconds"])
    stage = run.stages[0]
    rate = stage.tokens_per_step / seconds
    flops = rate * flops_per_token(run.model, stage.seq_length)
    return {
        "step_ms": 1e3 * seconds,
        "turns_ms": [1e3 * statistics.median(turn["seconds"]) for turn in turns],
        "tokens_per_s": rate,
        "model_tflops": flops / 1e12,
        "mfu": flops / peak,
        "first_s": [turn["first_s"] for turn in turns],
        "peak_gib": max(turn["peak_gib"] for turn in turns),
        "loss": turns[0]["loss"],
    }


def _show(results: dict[str, dict[str, dict[str, Any]]], device: str, peak: float) -> None:
    title = f"{device}, BF16 matmul {peak / 1e12:.0f} TFLOP/s"
    table = Table(title=title)
    for column in (
        "slice",
        "loop",
        "step ms",
        "tokens/s",
        "model TFLOP/s",
        "of matmul",
        "peak GiB",
        "first s",
        "speed",
    ):
        table.add_column(column)
    for name, loops in results.items():
        base = loops.get("peer")
        for loop, found in loops.items():
            ratio = "" if base is None else f"{base['step_ms'] / found['step_ms']:.2f}x"
            cells = (f"{found['step_ms']:.1f}", f"{found['tokens_per_s']:,.0f}", f"{found['model_tflops']:.0f}")
            firsts = " ".join(f"{first:.0f}" for first in found["first_s"])
            table.add_row(name, loop, *cells, f"{found['mfu']:.1%}", f"{found['peak_gib']:.1f}", firsts, ratio)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
