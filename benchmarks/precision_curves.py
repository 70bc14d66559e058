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
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from nemotron3_megatron.telemetry.curves import smoothed
from nemotron3_megatron.telemetry.jsonlines import read_evals, read_steps

TRAIN = Path(__file__).resolve().parents[1] / "train.py"
COLOURS = ("#1f2933", "#1f6fb2", "#d9480f", "#2b8a3e", "#5f3dc4")


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
    draw(runs, picture)
    show(runs, picture)


def draw(runs: dict[str, Path], picture: Path) -> None:
    """Loss on the left, distance from the first run on the right."""
    figure = Figure(figsize=(11, 4.2), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    base = smoothed([step.loss for step in read_steps(next(iter(runs.values())))])
    for colour, (name, run_dir) in zip(COLOURS, runs.items(), strict=False):
        steps = read_steps(run_dir)
        tokens = [step.tokens / 1e6 for step in steps]
        loss = smoothed([step.loss for step in steps])
        left.plot(tokens, loss, color=colour, label=name, linewidth=1.4)
        right.plot(tokens, loss - base, color=colour, label=name, linewidth=1.4)
        evals = read_evals(run_dir)
        left.plot(
            [e.tokens / 1e6 for e in evals], [e.validation_loss for e in evals], "o", color=colour, markersize=3.5
        )
    _label(left, "training loss, nats a token (points: validation)")
    _label(right, f"distance from {next(iter(runs))}, nats")
    spread = max(abs(value) for axis in (right,) for line in axis.lines for value in line.get_ydata()[len(base) // 4 :])
    right.set_ylim(-1.2 * spread, 1.6 * spread)
    left.legend(frameon=False)
    canvas.print_png(picture)


def show(runs: dict[str, Path], picture: Path) -> None:
    """The last validation losses, and where the picture is."""
    table = Table("policy", "validation loss", "MTP", "above the first")
    first = read_evals(next(iter(runs.values())))[-1].validation_loss
    for name, run_dir in runs.items():
        last = read_evals(run_dir)[-1]
        depths = " ".join(f"{loss:.4f}" for loss in last.mtp_losses)
        table.add_row(name, f"{last.validation_loss:.4f}", depths, f"{last.validation_loss / first - 1:+.2%}")
    console = Console()
    console.print(table)
    console.print(f"{picture}")


def _label(axis: Axes, text: str) -> None:
    axis.set_xlabel("million tokens")
    axis.set_title(text, loc="left", fontsize=10)
    axis.grid(color="#e4e8ec", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    main()
