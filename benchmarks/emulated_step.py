"""Step time of a slice of Nano with emulated NVFP4 over the same slice in BF16, on one GPU.

    python benchmarks/emulated_step.py [--policies bf16,nemotron3_nvfp4] [--steps 10] [--json]

Each policy is built, warmed up and timed in a process of its own, twice over, so that drift of the GPU's clocks shows;
the figure is the median of both turns. Routing is what fresh weights give; tokens are random.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from slices import in_fresh_process, open_gpu, random_batches, slice_run

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.step import train_step

TURNS = 2
WARMUP_STEPS = 3


def main() -> None:
    """Time all policies and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="bf16,nemotron3_nvfp4", help="names in recipes/precision; the first is 1")
    parser.add_argument("--slice", default="nano", help="in benchmarks/slices.py")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides of every policy")
    options = parser.parse_args()
    policies = options.policies.split(",")
    runs = {name: slice_run(options.slice, [f"precision={name}", *options.overrides]) for name in policies}
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in policies}
    for _ in range(TURNS):
        for name, run in runs.items():
            turns[name].append(in_fresh_process(_time, run, options.steps))
    results = {name: _summary(measured, turns[policies[0]]) for name, measured in turns.items()}
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        _show(runs[policies[0]], results)


def _time(run: Run, steps: int) -> dict[str, Any]:
    """Seconds of each timed step, the backend in force, the last loss and the peak memory."""
    started = time.perf_counter()
    seconds: list[float] = []
    platform = open_gpu()
    trainer = build_trainer(run, platform, start_groups(run, platform))
    for step in range(WARMUP_STEPS + steps):
        batches = random_batches(run, step)
        platform.synchronize()
        begin = time.perf_counter()
        loss = train_step(trainer, batches, run.stages[0], 1e-4).losses[0]
        platform.synchronize()
        seconds.append(time.perf_counter() - begin)
        if step == 0:
            first = time.perf_counter() - started
    return {
        "device": torch.cuda.get_device_name(),
        "seconds": seconds[WARMUP_STEPS:],
        "first_s": first,
        "backend": trainer.backend,
        "loss": loss,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def _summary(turns: list[dict[str, Any]], base: list[dict[str, Any]]) -> dict[str, Any]:
    def median(measured: list[dict[str, Any]]) -> float:
        return statistics.median(second for turn in measured for second in turn["seconds"])

    return {
        "device": turns[0]["device"],
        "backend": turns[0]["backend"],
        "step_ms": 1e3 * median(turns),
        "turns_ms": [1e3 * statistics.median(turn["seconds"]) for turn in turns],
        "first_s": turns[0]["first_s"],
        "ratio": median(turns) / median(base),
        "loss": turns[0]["loss"],
        "peak_gib": max(turn["peak_gib"] for turn in turns),
    }


def _show(run: Run, results: dict[str, dict[str, Any]]) -> None:
    parameters = count_parameters(run.model).total / 1e9
    device = next(iter(results.values()))["device"]
    table = Table(title=f"{device}, {run.model.pattern}, {parameters:.2f} B parameters")
    for column in ("policy", "backend", "step ms", "each turn ms", "first s", "over first", "loss", "peak GiB"):
        table.add_column(column)
    for name, result in results.items():
        each = " ".join(f"{turn:.0f}" for turn in result["turns_ms"])
        cells = (f"{result['step_ms']:.1f}", each, f"{result['first_s']:.1f}", f"{result['ratio']:.3f}")
        table.add_row(name, result["backend"], *cells, f"{result['loss']:.4f}", f"{result['peak_gib']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
