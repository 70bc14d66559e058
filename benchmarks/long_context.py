"""Memory and speed of a training step on one long sequence, by its length.

    python benchmarks/long_context.py --device cpu --cp 2 --out long_context
    python benchmarks/long_context.py --device cuda --lengths 524288
    python benchmarks/long_context.py --device cuda --largest
    python benchmarks/long_context.py --device cuda --cp 2 --lengths 1048576

On a CPU it trains the whole tiny model (recipe ``tiny``, float32), on CUDA a slice of Nano with full widths. Each
length runs in fresh processes, one a context-parallel rank, and is shown as soon as it is done. On CUDA the plan's
memory is compared with the GPU's first. ``--largest`` begins with the longest sequence that the plan fits.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from long_picture import draw
from long_step import MODELS, Measured, long_run, measure
from slices import in_fresh_process, on_gpus

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.memory import memory_plan

GIB = 2**30
STRIDE = 65_536
"""Between the lengths that ``--largest`` tries."""
RESERVE_GIB = 4.0
"""Left to CUDA's context, NCCL and fragments, as the plan does."""


def main() -> None:
    """Measure, show, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--model", choices=tuple(MODELS), help="tiny on a CPU, nano on CUDA")
    parser.add_argument("--lengths", default="4k,8k,16k,32k,64k")
    parser.add_argument("--cp", type=int, default=1)
    parser.add_argument("--steps", type=int, help="the last one is timed; 1 on a CPU and with --largest, else 2")
    parser.add_argument("--largest", action="store_true", help="the largest length that fits, in place of --lengths")
    parser.add_argument("--budget-s", type=float, default=120.0, help="--largest starts no length after so long")
    parser.add_argument("--force", action="store_true", help="try what the plan says does not fit")
    parser.add_argument("--out", type=Path, help="folder for long_context.json and long_context_memory.png")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides")
    options = parser.parse_args()
    options.model = options.model or ("tiny" if options.device == "cpu" else "nano")
    options.steps = options.steps or (1 if options.device == "cpu" or options.largest else 2)
    name, capacity = _device(options.device)
    print(f"{name}; {options.model}, cp {options.cp}, {' '.join(options.overrides)}", flush=True)
    print(f"{'tokens':>10} {'planned GiB':>12} {'peak GiB a rank':>16} {'s/step':>8} {'tokens/s':>9}  time", flush=True)
    rows = _largest(options, capacity) if options.largest else _each(options, capacity)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        record = {"device": name, "model": options.model, "cp": options.cp, "rows": rows}
        (options.out / "long_context.json").write_text(json.dumps(record, indent=2) + "\n")
        draw(rows, f"{options.model}, CP {options.cp}, {name}", options.out / "long_context_memory.png")


def _each(options: argparse.Namespace, capacity: float | None) -> list[dict[str, Any]]:
    rows = []
    for text in options.lengths.split(","):
        length = int(text.removesuffix("k")) * (1024 if text.endswith("k") else 1)
        planned = _planned(options, length)
        if capacity is not None and planned > capacity - RESERVE_GIB and not options.force:
            print(
                f"{length:10,} {planned:12.1f}  not tried: the GPU has {capacity:.1f} GiB (--force tries)", flush=True
            )
            continue
        rows.append(_row(options, length, planned))
    return rows


def _largest(options: argparse.Namespace, capacity: float | None) -> list[dict[str, Any]]:
    """Lengths in multiples of ``STRIDE * cp``, from what the plan fits to where success turns into failure."""
    if capacity is None:
        raise SystemExit("--largest wants --device cuda: a CPU's memory is the machine's")
    begin, stride = time.monotonic(), STRIDE * options.cp
    length = stride
    while _planned(options, length + stride) < capacity - RESERVE_GIB:
        length += stride
    rows: list[dict[str, Any]] = []
    while length >= stride and time.monotonic() - begin < options.budget_s:
        rows.append(_row(options, length, _planned(options, length)))
        fits = not rows[-1]["error"]
        if len(rows) > 1 and fits == bool(rows[-2]["error"]):
            break
        length += stride if fits else -stride
    fitting = [row["length"] for row in rows if not row["error"]]
    print(f"largest that fits: {max(fitting):,}" if fitting else "none of these fits", flush=True)
    return rows


def _row(options: argparse.Namespace, length: int, planned: float) -> dict[str, Any]:
    """Measure one length and print it."""
    try:
        ranks: list[Measured] = on_gpus(options.cp, measure, _run(options, length), options.steps)
        failed = next((rank.error for rank in ranks if rank.error), "")
    except BrokenProcessPool:
        ranks, failed = [], "a rank failed; its own words are above"
    peaks = " ".join(f"{rank.peak / GIB:.2f}" for rank in ranks)
    if failed:
        print(f"{length:10,} {planned:12.1f} {peaks:>16}  {failed}", flush=True)
    else:
        seconds = max(rank.seconds[-1] for rank in ranks)
        shares = ", ".join(f"{kind} {share:.0%}" for kind, share in ranks[0].shares.items())
        print(f"{length:10,} {planned:12.1f} {peaks:>16} {seconds:8.2f} {length / seconds:9,.0f}  {shares}", flush=True)
    ranks_as_rows = [dataclasses.asdict(rank) for rank in ranks]
    return {"length": length, "planned_gib": planned, "error": failed, "ranks": ranks_as_rows}


def _planned(options: argparse.Namespace, length: int) -> float:
    """GiB of tensors on the fullest rank: on a CPU, interpreter and libraries come on top."""
    return memory_plan(_run(options, length)).fullest.total / GIB


def _run(options: argparse.Namespace, length: int) -> Run:
    return long_run(options.model, options.device, length, options.cp, options.overrides)


def _device(device: str) -> tuple[str, float | None]:
    """Name, and GiB of memory of a GPU."""
    return ("CPU, resident memory", None) if device == "cpu" else in_fresh_process(_gpu)


def _gpu() -> tuple[str, float]:
    properties = torch.cuda.get_device_properties(0)
    return properties.name, properties.total_memory / GIB


if __name__ == "__main__":
    main()
