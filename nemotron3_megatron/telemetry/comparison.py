"""Runs beside one another: what each loses, how far from the first, and at what speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from rich.box import SIMPLE
from rich.table import Table

from nemotron3_megatron.drawing import FAINT, INK, plain
from nemotron3_megatron.telemetry.curves import Array, smoothed
from nemotron3_megatron.telemetry.jsonlines import read_evals, read_some_steps
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.throughput import WARMUP_STEPS, format_count

PICTURE = "comparison.png"
_COLOURS = (INK, "#1f6fb2", "#d9480f", "#2b8a3e", "#5f3dc4")
_EARLY = 1 / 4
"""Of the tokens: there the distance may leave the picture, since losses fall fastest."""


@dataclass(frozen=True)
class Compared:
    """A run, by what it recorded."""

    name: str
    steps: tuple[StepRecord, ...]
    """At least one."""
    evals: tuple[EvalRecord, ...]

    @cached_property
    def tokens(self) -> Array:
        """(steps,) seen by the end of each step."""
        return np.array([record.tokens for record in self.steps], dtype=np.float64)

    @cached_property
    def losses(self) -> Array:
        """(steps,) smoothed training loss, nats a token."""
        return smoothed([record.loss for record in self.steps])

    @property
    def step_s(self) -> float:
        """Median seconds of a step, the first ones left out."""
        return median(record.step_time_s for record in self.steps[WARMUP_STEPS:] or self.steps)


def read_compared(run_dirs: Sequence[Path]) -> list[Compared]:
    """Read runs; each is called by the last part of its path, or by all of it where those are alike.

    Raises:
        UserError: a directory holds no run, or one without a step.
    """
    short = [path.resolve().name for path in run_dirs]
    names = short if len(set(short)) == len(short) else [str(path) for path in run_dirs]
    return [
        Compared(name, tuple(read_some_steps(path)), tuple(read_evals(path)))
        for name, path in zip(names, run_dirs, strict=True)
    ]


def distance(first: Compared, other: Compared) -> tuple[Array, Array]:
    """How much more ``other`` loses than ``first`` after as many tokens.

    Returns:
        Tokens at the ends of those steps of ``other`` that lie between ``first``'s first and last one, and the
        difference of the smoothed losses there, nats.
    """
    tokens, losses = other.tokens, other.losses
    inside = (tokens >= first.tokens[0]) & (tokens <= first.tokens[-1])
    return tokens[inside], losses[inside] - np.interp(tokens[inside], first.tokens, first.losses)


def draw_comparison(path: Path, runs: Sequence[Compared]) -> None:
    """Write a PNG (1650 x 630 pixels): losses on the left, distances from the first run on the right.

    Raises:
        ValueError: fewer than two runs.
    """
    if len(runs) < 2:
        raise ValueError("a comparison needs two runs")
    figure = Figure(figsize=(11, 4.2), dpi=150, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    spread = 0.0
    for index, run in enumerate(runs):
        colour = _colour(index)
        left.plot(run.tokens, run.losses, color=colour, label=run.name, linewidth=1.4)
        points = [record.tokens for record in run.evals], [record.validation_loss for record in run.evals]
        left.plot(*points, "o", color=colour, markersize=3.5)
        tokens, more = distance(runs[0], run)
        right.plot(tokens, more, color=colour, linewidth=1.4)
        late = more[tokens >= tokens[0] + _EARLY * (tokens[-1] - tokens[0])] if len(tokens) else more
        spread = max([spread, *np.abs(late[np.isfinite(late)])])
    right.set_ylim(-1.4 * (spread or 1), 1.4 * (spread or 1))
    validated = " (points: validation)" if any(run.evals for run in runs) else ""
    _label(left, f"training loss, nats a token{validated}")
    _label(right, f"distance from {runs[0].name}, nats")
    left.legend(frameon=False, labelcolor=INK)
    figure.savefig(path)


def comparison_table(runs: Sequence[Compared]) -> Table:
    """A row a run: the last losses (training: smoothed), speed, peak memory of rank 0; and how each differs from the
    first run's, where losses are compared after as many tokens."""
    table = Table("run", "tokens", "loss", "validation", "s/step", "GiB", box=SIMPLE, padding=0)
    table.columns[0].overflow = "fold"
    for column in table.columns[1:]:
        column.justify, column.no_wrap = "right", True
    first, *others = runs
    table.add_row(*_cells(first))
    for run in others:
        _, more = distance(first, run)
        above = ("", "", f" {more[-1]:+.4f}" if len(more) else "", _validated_above(first, run))
        cells = zip(_cells(run), (*above, f" x{run.step_s / first.step_s:.3f}", ""), strict=True)
        table.add_row(*(value + difference for value, difference in cells))
    return table


def _cells(run: Compared) -> tuple[str, ...]:
    memory = [record.peak_memory_gib for record in run.steps if record.peak_memory_gib is not None]
    return (
        run.name,
        format_count(run.steps[-1].tokens),
        f"{run.losses[-1]:.4f}",
        f"{run.evals[-1].validation_loss:.4f}" if run.evals else "",
        f"{run.step_s:.4f}",
        f"{max(memory):.1f}" if memory else "",
    )


def _validated_above(first: Compared, other: Compared) -> str:
    """Relative, of the last validation after as many tokens; empty where there is none."""
    losses = {record.tokens: record.validation_loss for record in first.evals}
    both = [record for record in other.evals if record.tokens in losses]
    return f" {both[-1].validation_loss / losses[both[-1].tokens] - 1:+.2%}" if both else ""


def _colour(index: int) -> object:
    return _COLOURS[index] if index < len(_COLOURS) else colormaps["tab20"](index % 20)


def _label(axes: Axes, text: str) -> None:
    axes.set_title(text, loc="left", fontsize=10, color=INK)
    axes.set_xlabel("tokens", color=FAINT)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    plain(axes)
