"""Train `tiny_nvfp4` under several precision policies from the same seed, and draw what each costs.

    python -m data_prep recipe=quickstart
    python benchmarks/precision_curves.py [--policies fp32,nemotron3_nvfp4,all_nvfp4] [--runs runs/curve_]

One process a run, about fifteen minutes each on one core; finished runs are not repeated and unfinished ones continue.
Writes `precision_curves.png` beside the runs: loss, and how far each policy's loss is from the first one's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from nemotron3_megatron.telemetry.comparison import comparison_table, draw_comparison, read_compared

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def main() -> None:
    """Train what is missing, then draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policies", default="fp32,nemotron3_nvfp4,all_nvfp4", help="the first is the baseline")
    parser.add_argument("--runs", default="runs/curve_", help="run directories are this and the policy's name")
    parser.add_argument("overrides", nargs="*", help="further recipe overrides of every run")
    options = parser.parse_args()
    runs = {name: Path(f"{options.runs}{name}") for name in options.policies.split(",")}
    for name, run_dir in runs.items():
        settings = [f"precision={name}", "precision.dtype=fp32", "parallel=single", "telemetry.wandb=disabled"]
        command = ["recipe=tiny_nvfp4", *settings, f"run_dir={run_dir}", *options.overrides]
        subprocess.run(
            [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", str(TRAIN), *command],
            check=True,
        )
    picture = Path(f"{options.runs}curves.png").with_name("precision_curves.png")
    compared = [replace(run, name=name) for name, run in zip(runs, read_compared(list(runs.values())), strict=True)]
    draw_comparison(picture, compared)
    console = Console()
    console.print(comparison_table(compared))
    console.print(f"{picture}")


if __name__ == "__main__":
    main()
