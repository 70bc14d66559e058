"""The learning rate over the tokens of a run as a picture, with its stages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.drawing import FAINT, GRID, INK
from nemotron3_megatron.telemetry.throughput import format_count
from nemotron3_megatron.train.schedule import learning_rate

_RATE = "#1f6fb2"
_BEDS = ("#eef3f9", "#f9f3e6")
"""Of the stages in turn."""

_NARROWEST = 0.09
"""Of the run: the names of shorter stages stand beside them."""

_POINTS = 600


def draw_schedule(path: Path, run: Run) -> None:
    """Write a PNG.

    Raises:
        OSError: the file cannot be written.
    """
    figure = Figure(figsize=(11, 3.4), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0.075, 0.17, 0.9, 0.66))
    end, schedule = run.tokens_at(run.total_steps), run.schedule
    # Corners are points of their own, so that they are sharp however short the warm-up is.
    corners = [schedule.warmup_tokens, schedule.decay_end_tokens - schedule.wsd_decay_tokens, schedule.decay_end_tokens]
    corners += [token for part in schedule.constant for token in (part.first_token - 1, part.first_token)]
    tokens = sorted({*np.linspace(0, end - 1, _POINTS).astype(int).tolist(), *(c for c in corners if 0 < c < end)})
    rates = [learning_rate(schedule, token) for token in tokens]
    axes.plot(tokens, rates, color=_RATE, linewidth=2, zorder=3, solid_joinstyle="round")
    axes.fill_between(tokens, rates, color=_RATE, alpha=0.1, linewidth=0, zorder=2)
    axes.set_xlim(0, end)
    axes.set_ylim(0, 1.1 * schedule.max_lr)
    _draw_stages(axes, run, end)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: format_count(value)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(length=0, labelsize=8.5, colors=FAINT)
    axes.grid(axis="y", color=GRID, linewidth=0.8, zorder=1)
    axes.set_xlabel("tokens", fontsize=8.5, color=FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    figure.text(0.012, 0.92, "learning rate", fontsize=9, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_stages(axes: Axes, run: Run, end: int) -> None:
    """A bed for each stage that the run reaches, its name above."""
    for index, stage in enumerate(run.stages):
        first, last = stage.first_token, min(stage.tokens_at(stage.end_step), end)
        if first >= end:
            return
        axes.axvspan(first, last, color=_BEDS[index % 2], linewidth=0, zorder=0)
        is_wide = last - first > _NARROWEST * end
        axes.annotate(
            f"{stage.name}: {format_count(last - first)} tokens, sequences of {_lengths(stage)}"
            if last - first > 3 * _NARROWEST * end
            else stage.name,
            ((first + last) / 2 if is_wide else last, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 4 if is_wide else 4 + 11 * (index % 2)),
            textcoords="offset points",
            ha="center" if is_wide else "right",
            fontsize=8.5,
            color=INK,
        )


def _lengths(stage: Stage) -> str:
    return " and ".join(dict.fromkeys(f"{shape.seq_length:,}" for shape in stage.shapes))
