"""Losses by tag of the data's sources: a picture and a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nemotron3_megatron.drawing import FAINT, INK, plain
from nemotron3_megatron.telemetry.curves import smoothed
from nemotron3_megatron.telemetry.html import Section
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.throughput import format_count

_COLOURS = 10


def draw_tag_losses(path: Path, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], *, title: str) -> None:
    """Write a PNG: of each tag the smoothed training loss over steps, and dots of its colour for validation."""
    figure = Figure(figsize=(11, 4.6), dpi=160, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    palette = colormaps["tab10"]
    for index, tag in enumerate(names := _names(steps, evals)):
        colour, line = palette(index % _COLOURS), "-" if index < _COLOURS else "--"
        places, losses = _curve(steps, tag)
        axes.plot(places, smoothed(losses) if losses else [], line, color=colour, label=tag, linewidth=1.8)
        axes.plot(*_curve(evals, tag), "o", color=colour, markeredgecolor="white")
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_xlabel("step", color=FAINT)
    axes.set_ylabel("loss (nats per token)", color=FAINT)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    plain(axes)
    figure.legend(loc="outside lower center", ncols=min(len(names), 6), frameon=False, fontsize=9, labelcolor=INK)
    figure.savefig(path)


def tag_section(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> Section:
    """A row for each tag: tokens with loss, the last training loss (smoothed), the last validation loss."""
    rows = []
    for tag in _names(steps, evals):
        tokens = sum(record.tags[tag].tokens for record in steps if tag in record.tags)
        (_, losses), (_, held_out) = _curve(steps, tag), _curve(evals, tag)
        last = [
            _number(float(each[-1])) if len(each) else "" for each in (smoothed(losses) if losses else [], held_out)
        ]
        rows.append((tag, format_count(tokens), *last))
    return Section("Loss by tag", ("tag", "tokens with loss", "training (smoothed)", "validation"), rows)


def _names(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> list[str]:
    """In the order in which they were first read."""
    return list(dict.fromkeys(tag for records in (steps, evals) for record in records for tag in record.tags))


def _curve(records: Sequence[StepRecord] | Sequence[EvalRecord], tag: str) -> tuple[list[int], list[float]]:
    """Steps that read the tag, and its loss in them."""
    read = [(record.step, record.tags[tag].loss) for record in records if tag in record.tags]
    return [step for step, _ in read], [loss for _, loss in read]


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else ""
