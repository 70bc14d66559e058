"""Tokens a second on one GPU and on several of one node, at equal work a GPU.

    python benchmarks/scaling.py [--slices nano,a315m] [--gpus 1,2] [--layout ep] [--steps 10] [--warmup 4] [--json]
                                 [--profile DIR]

N GPUs train with N expert-parallel ranks (or N data-parallel ones: --layout dp) and N times the sequences; all experts
stay as they are. ``--profile`` writes rank 0's kernels by time, collectives among them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from slices import SLICES, in_fresh_process, on_gpus, slice_run
from timing import WARMUP_STEPS, summary, time_steps


def main() -> None:
    """Time all slices and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slices", default="nano,a315m", help=f"of {', '.join(SLICES)}")
    parser.add_argument("--gpus", default="1,2", help="sizes of the world; the first is the base")
    parser.add_argument("--layout", choices=("ep", "dp"), default="ep")
    parser.add_argument("--loop", choices=("ours", "peer"), default="ours")
    parser.add_argument("--steps", type=int, default=10, help="timed steps")
    parser.add_argument(
        "--warmup", type=int, default=WARMUP_STEPS, help="steps before; fresh routers move fast at first"
    )
    parser.add_argument("--sequences", type=int, default=2, help="a GPU and step")
    parser.add_argument("--balanced", action="store_true", help="every expert gets as many tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("--profile", type=Path, help="folder for the kernels of two steps")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides")
    options = parser.parse_args()
    results: dict[str, dict[int, dict[str, Any]]] = {}
    for name in options.slices.split(","):
        for size in map(int, options.gpus.split(",")):
            layout = [f"parallel.ep={size}"] if options.layout == "ep" else []
            run = slice_run(name, [*layout, *options.overrides], size, options.sequences)
            report = options.profile and options.profile / f"{name}_{options.loop}_{size}.txt"
            ranks = on_gpus(
                size, time_steps, run, options.loop, options.steps, options.balanced, report, options.warmup
            )
            results.setdefault(name, {})[size] = summary(run, ranks[:1])
    device = in_fresh_process(torch.cuda.get_device_name)
    if options.json:
        print(json.dumps({"device": device, "layout": options.layout, "slices": results}, indent=2))
    else:
        _show(device, options.layout, results)


def _show(device: str, layout: str, results: dict[str, dict[int, dict[str, Any]]]) -> None:
    table = Table(title=f"{device}, {layout}")
    for column in ("slice", "GPUs", "step ms", "tokens/s/GPU", "model TFLOP/s/GPU", "peak GiB", "times one base GPU"):
        table.add_column(column)
    for name, sizes in results.items():
        base = next(iter(sizes.values()))
        for size, found in sizes.items():
            speed = size * found["tokens_per_s_per_gpu"] / base["tokens_per_s_per_gpu"]
            cells = (f"{found['step_ms']:.1f}", f"{found['tokens_per_s_per_gpu']:,.0f}", f"{found['model_tflops']:.0f}")
            table.add_row(name, str(size), *cells, f"{found['peak_gib']:.1f}", f"{speed:.2f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
