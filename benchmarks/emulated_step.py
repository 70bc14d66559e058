"""Step time of a slice of Nano with emulated NVFP4 over the same slice in BF16, on one GPU.

    python benchmarks/emulated_step.py [--policies bf16,nemotron3_nvfp4] [--steps 10] [--json]

Each policy is built, warmed up and timed in a process of its own, twice over, so that drift of the GPU's clocks shows;
the figure is the median of both turns. Routing is what fresh weights give; tokens are random.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from slices import in_fresh_process, slice_run
from timing import Timing, summary, time_steps

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.counts import count_parameters

TURNS = 2


def main() -> None:
    """Time all policies and show them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="bf16,nemotron3_nvfp4", help="names in recipes/precision; the first is 1")
    parser.add_argument("--slice", default="nano", help="in benchmarks/slices.py")
    parser.add_argument("--steps", type=int, default=10, help="timed steps a turn")
    parser.add_argument("--balanced", action="store_true", help="every expert gets as many tokens")
    parser.add_argument("--json", action="store_true", help="one JSON object, nothing else")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides of every policy")
    options = parser.parse_args()
    policies = options.policies.split(",")
    runs = {name: slice_run(options.slice, [f"precision={name}", *options.overrides]) for name in policies}
    turns: dict[str, list[Timing]] = {name: [] for name in policies}
    for _ in range(TURNS):
        for name, run in runs.items():
            turns[name].append(in_fresh_process(time_steps, run, "ours", options.steps, options.balanced))
    results = {name: summary(runs[name], measured) for name, measured in turns.items()}
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        _show(runs[policies[0]], results)


def _show(run: Run, results: dict[str, dict[str, Any]]) -> None:
    parameters = count_parameters(run.model).total / 1e9
    device = in_fresh_process(torch.cuda.get_device_name)
    base = next(iter(results.values()))["step_ms"]
    table = Table(title=f"{device}, {run.model.pattern}, {parameters:.2f} B parameters")
    for column in ("policy", "backend", "step ms", "each turn ms", "first s", "over first", "loss", "peak GiB"):
        table.add_column(column)
    for name, result in results.items():
        each = " ".join(f"{turn:.0f}" for turn in result["turns_ms"])
        cells = (f"{result['step_ms']:.1f}", each, f"{result['first_s'][0]:.1f}", f"{result['step_ms'] / base:.3f}")
        table.add_row(name, result["backend"], *cells, f"{result['loss']:.4f}", f"{result['peak_gib']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
