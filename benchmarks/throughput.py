"""Our loop against a plain Megatron-Core loop with stock settings, interleaved, on one GPU.

    python benchmarks/throughput.py [--slices nano,super,a315m] [--steps 10] [--json] [--profile DIR]

Each case is built, warmed up and timed in a process of its own, twice over (ours, peer, ours, peer). MFU is measured
against the matmul rate of this GPU, taken in the same run. ``--profile`` writes the kernels of two steps by time, and
how long the GPU had nothing to do.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from slices import SLICES, in_fresh_process, slice_run
from timing import Timing, summary, time_steps

TURNS = 2


def main() -> None:
    """Time all slices and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", default="nano,super", help=f"of {', '.join(SLICES)}")
    parser.add_argument("--loops", default="ours,peer")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--sequences", type=int, default=2, help="a GPU and step")
    parser.add_argument("--balanced", action="store_true", help="every expert gets as many tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of two steps")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides")
    options = parser.parse_args()
    device, peak = in_fresh_process(matmul_rate)
    results = {}
    for name in options.slices.split(","):
        run = slice_run(name, options.overrides, sequences=options.sequences)
        turns: dict[str, list[Timing]] = {loop: [] for loop in options.loops.split(",")}
        for turn in range(options.turns):
            for loop, measured in turns.items():
                folder = options.profile if turn == 0 else None
                report = folder and folder / f"{name}_{loop}.txt"
                measured.append(in_fresh_process(time_steps, run, loop, options.steps, options.balanced, report))
        results[name] = {loop: summary(run, measured) for loop, measured in turns.items()}
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
            cells = (f"{found['step_ms']:.1f}", f"{found['tokens_per_s_per_gpu']:,.0f}", f"{found['model_tflops']:.0f}")
            firsts = " ".join(f"{first:.0f}" for first in found["first_s"])
            table.add_row(
                name,
                loop,
                *cells,
                f"{found['model_tflops'] * 1e12 / peak:.1%}",
                f"{found['peak_gib']:.1f}",
                firsts,
                ratio,
            )
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
