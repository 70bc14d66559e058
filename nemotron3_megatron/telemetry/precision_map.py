"""Pictures of what quantisation loses: where in the model, and how it goes over a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from nemotron3_megatron.drawing import EMPTY, FAINT, INK, plain
from nemotron3_megatron.telemetry.records import OperandRecord, StepRecord
from nemotron3_megatron.telemetry.scalars import precision_scalars

type Array = npt.NDArray[np.float64]

_PANELS = (("flush_to_zero", "flushed to zero", "magma_r"), ("relative_error", "relative error", "viridis_r"))
_SPOKEN = {
    "input": "input, fprop",
    "input_columns": "input, wgrad",
    "weight": "weight",
    "weight_columns": "weight, dgrad",
    "gradient": "gradient, dgrad",
    "gradient_columns": "gradient, wgrad",
}
"""Operands by the GEMM that reads them so (a weight by fprop, and by dgrad too where its blocks are square)."""

_ROW, _CELL = 0.17, 0.125
_LEFT, _TOP, _BAR, _BOTTOM = 2.35, 0.95, 0.95, 0.8
"""Inches: a cell, and what surrounds a panel (its colour bar stands on the right)."""
_FEW = 30
"""Layers up to which the panels stand side by side."""


def draw_precision_map(path: Path, record: StepRecord, *, title: str) -> None:
    """Write a PNG: layers across, roles and their operands down; one panel of flushed shares, one of errors.

    Args:
        path: where to write.
        record: a sampled step.
        title: heading.

    Raises:
        ValueError: the step was not sampled.
    """
    if not record.precision:
        raise ValueError(f"step {record.step} has no sampled operands")
    columns, groups = _columns(record.precision), _groups(record.precision)
    beside = len(columns) <= _FEW
    width, height = max(len(columns) * _CELL, 3.2), len(groups) * _ROW
    across, down = (len(_PANELS), 1) if beside else (1, len(_PANELS))
    size = _LEFT + across * (width + _BAR), _TOP + down * (height + _BOTTOM)
    figure = Figure(figsize=size, dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.2 / size[0], 1 - 0.35 / size[1], title, fontsize=13, fontweight="bold", color=INK)
    for index, (name, label, colours) in enumerate(_PANELS):
        left = _LEFT + (index * (width + _BAR) if beside else 0)
        bottom = size[1] - _TOP - height - (0 if beside else index * (height + _BOTTOM))
        axes, bar = (
            figure.add_axes((x / size[0], bottom / size[1], breadth / size[0], height / size[1]))
            for x, breadth in ((left, width), (left + width + 0.12, 0.13))
        )
        _draw_panel(axes, bar, _cells(record.precision, name, columns, groups), colormaps[colours])
        axes.set_title(label, loc="left", fontsize=10, color=INK)
        _name_rows(axes, groups, named=not (beside and index))
        _name_columns(axes, columns)
    figure.savefig(path)


def draw_precision_history(path: Path, records: Sequence[StepRecord], *, title: str) -> None:
    """Write a PNG: the flushed share of each role over steps, one panel for each kind of operand.

    Args:
        path: where to write.
        records: steps, of which the sampled ones are drawn; at least one.
        title: heading.

    Raises:
        ValueError: no step was sampled.
    """
    sampled = [record for record in records if record.precision]
    if not sampled:
        raise ValueError("no step has sampled operands")
    curves = _flushed_by_role(sampled)
    labels = [label for label in _SPOKEN if any(label == found for _, found in curves)]
    roles = list(dict.fromkeys(role for role, _ in curves))
    figure = Figure(figsize=(11, 3.3), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(labels), sharex=True, sharey=True, squeeze=False)[0]
    figure.subplots_adjust(left=0.065, right=0.985, top=0.79, bottom=0.27, wspace=0.1)
    figure.text(0.02, 0.92, title, fontsize=13, fontweight="bold", color=INK)
    steps = [record.step for record in sampled]
    mark = "o" if len(steps) < 30 else None
    for axes, label in zip(panels, labels, strict=True):
        for index, role in enumerate(roles):
            if (values := curves.get((role, label))) is not None:
                colour, dashes = colormaps["tab10"](index % 10), "-" if index < 10 else "--"
                style: dict[str, Any] = {"color": colour, "linewidth": 1.5, "marker": mark, "markersize": 3}
                axes.plot(steps, values, dashes, label=role, clip_on=False, **style)
        axes.set_title(_SPOKEN[label], fontsize=10, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
        plain(axes)
        axes.set_xlabel("step", color=FAINT)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("flushed to zero", color=FAINT)
    lines = {str(line.get_label()): line for axes in panels for line in axes.get_lines()}
    figure.legend(
        [lines[role] for role in roles], roles, loc="lower center", ncols=min(len(roles), 6), frameon=False, fontsize=9
    )
    figure.savefig(path)


def _columns(operands: Sequence[OperandRecord]) -> list[str]:
    """All decoder layers up to the last that was observed, and one column for each layer of MTP."""
    decoder = [operand.layer for operand in operands if operand.layer is not None]
    layers = [str(layer) for layer in range(max(decoder) + 1)] if decoder else []
    return layers + list(dict.fromkeys(_column(operand) for operand in operands if operand.layer is None))


def _column(operand: OperandRecord) -> str:
    """Layer number; in MTP, depth and layer of its own stack (``mtp 0``, ``mtp 0.1``)."""
    if operand.layer is not None:
        return str(operand.layer)
    return "mtp " + ".".join(part for part in operand.module.split(".") if part.isdigit())


def _groups(operands: Sequence[OperandRecord]) -> list[tuple[str, str]]:
    """(role, operand) of each row: roles as they come in the model."""
    found = {(operand.role, operand.label) for operand in operands}
    roles = dict.fromkeys(operand.role for operand in operands)
    return [(role, label) for role in roles for label in _SPOKEN if (role, label) in found]


def _cells(
    operands: Sequence[OperandRecord], name: str, columns: Sequence[str], groups: Sequence[tuple[str, str]]
) -> Array:
    """(rows, columns) values; NaN where nothing was observed."""
    values = np.full((len(groups), len(columns)), math.nan)
    for operand in operands:
        row = groups.index((operand.role, operand.label))
        values[row, columns.index(_column(operand))] = getattr(operand, name)
    return values


def _draw_panel(axes: Axes, bar: Axes, values: Array, colours: Colormap) -> None:
    finite = values[np.isfinite(values)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 0.01
    axes.set_facecolor(EMPTY)
    image = axes.imshow(values, aspect="auto", interpolation="nearest", cmap=colours, vmin=0, vmax=top)
    axes.spines[:].set_visible(False)
    axes.figure.colorbar(image, cax=bar, format=PercentFormatter(1.0, decimals=None))
    bar.tick_params(colors=FAINT, labelsize=8, length=0)
    bar.spines[:].set_visible(False)


def _name_rows(axes: Axes, groups: Sequence[tuple[str, str]], *, named: bool) -> None:
    """A line between roles; if ``named``, operands along the axis and each role once beside its operands."""
    names = [_SPOKEN[label] if named else "" for _, label in groups]
    axes.set_yticks(range(len(groups)), names, fontsize=7.5, color=FAINT)
    axes.tick_params(length=0)
    first = 0
    for role in dict.fromkeys(role for role, _ in groups):
        count = sum(role == other for other, _ in groups)
        if first:
            axes.axhline(first - 0.5, color="white", linewidth=2.5)
        axes.annotate(
            role if named else "",
            xy=(0, first + (count - 1) / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-80, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=INK,
        )
        first += count


def _name_columns(axes: Axes, columns: Sequence[str]) -> None:
    layers = sum(column.isdigit() for column in columns)
    every = 1 if layers <= 40 else 5
    shown = [place for place, column in enumerate(columns) if not column.isdigit() or int(column) % every == 0]
    axes.set_xticks(shown, [columns[place] for place in shown], fontsize=7.5, color=FAINT)
    for label in axes.get_xticklabels():
        label.set_rotation(0 if label.get_text().isdigit() else 90)
    axes.set_xlabel("layer", fontsize=8.5, color=FAINT, loc="left", labelpad=1)
    if 0 < layers < len(columns):
        axes.axvline(layers - 0.5, color="white", linewidth=2.5)


def _flushed_by_role(records: Sequence[StepRecord]) -> dict[tuple[str, str], list[float]]:
    """Mean flushed share over the layers of a role, by (role, operand): one value a record, NaN where unobserved."""
    prefix = "precision/flush_to_zero/"
    means = [precision_scalars(record.precision) for record in records]
    names = dict.fromkeys(name for found in means for name in found if name.startswith(prefix))
    keys = {name: name.removeprefix(prefix).split("/") for name in names}
    return {(role, label): [found.get(name, math.nan) for found in means] for name, (role, label) in keys.items()}
