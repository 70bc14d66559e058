"""The precision plan as a picture: layers from left to right, roles from top to bottom, coloured by format."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nemotron3_megatron.drawing import FAINT, INK
from nemotron3_megatron.plan.precision_shares import FORMATS
from nemotron3_megatron.precision.modules import FIXED
from nemotron3_megatron.precision.plan import PlanRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Format, Role

_BED = "#f3f5f7"
_COLOURS: dict[Format, str] = {"nvfp4": "#1f8a5b", "mxfp8": "#f2ac33", "bf16": "#93abc9"}
"""Of different lightness too, for whoever sees fewer colours."""

_BLOCKS = {"mamba": "Mamba", "attention": "Attention", "moe": "MoE", "mlp": "MLP", "mtp": "MTP"}

_CELL, _ROW = 0.135, 0.27  # inches
_LEFT, _RIGHT, _TOP, _BOTTOM = 1.75, 0.3, 0.95, 0.85
_MARGIN, _SHORTEST = 0.15, 8.0
_GAP = 1.0
"""Columns between the decoder and MTP."""


@dataclass(frozen=True, slots=True)
class _Grid:
    roles: tuple[Role, ...]
    columns: tuple[str, ...]
    """Names of the layers, up to the leaf: ``decoder.layers.7``, ``mtp.layers.0`` for its eh_proj."""
    depth: int
    """Columns of the decoder, the first ones."""
    cells: npt.NDArray[np.float64]
    """(roles, columns): index into FORMATS; NaN where the layer has no such role."""


def draw_precision_map(path: Path, plan: PrecisionPlan, title: str, subtitle: str) -> None:
    """Write a PNG as wide as the model is deep.

    Args:
        path: where to write; its directory is made.
        plan: at least one row.
        title: heading.
        subtitle: smaller, below it.

    Raises:
        OSError: the file cannot be written.
    """
    grid = _grid(plan.rows)
    beside = len(grid.columns) - grid.depth
    across = len(grid.columns) + (_GAP if beside else 0.0)
    cell = max(_CELL, (_SHORTEST - _LEFT - _RIGHT) / across)
    width, height = _LEFT + across * cell + _RIGHT, _TOP + len(grid.roles) * _ROW + _BOTTOM
    figure = Figure(figsize=(width, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    left, right = _LEFT / width, 1 - _RIGHT / width
    axes = figure.add_axes((left, _BOTTOM / height, right - left, 1 - (_TOP + _BOTTOM) / height))
    axes.set_xlim(0, across)
    axes.set_ylim(len(grid.roles), 0)
    _draw_cells(axes, grid)
    _label_roles(axes, grid)
    _label_layers(axes, grid)
    margin, always = _MARGIN / width, ", ".join(f"{part} {number_format}" for part, number_format in FIXED.items())
    figure.text(margin, 1 - 0.34 / height, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(margin, 1 - 0.6 / height, subtitle, fontsize=8.5, color=FAINT)
    figure.text(margin, _MARGIN / height, f"Under every policy: {always}", fontsize=7.5, color=FAINT)
    _draw_legend(figure, plan.rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _grid(rows: Sequence[PlanRow]) -> _Grid:
    used = {row.role for row in rows}
    order: tuple[Role, ...] = get_args(Role)
    blocks = list(_BLOCKS)
    roles = tuple(sorted(used, key=lambda role: (blocks.index(role.partition(".")[0]), order.index(role))))
    columns = tuple(dict.fromkeys(_column(row) for row in rows))
    cells = np.full((len(roles), len(columns)), np.nan)
    for row in rows:
        cells[roles.index(row.role), columns.index(_column(row))] = FORMATS.index(row.format)
    return _Grid(roles, columns, sum(name.startswith("decoder.") for name in columns), cells)


def _column(row: PlanRow) -> str:
    match = re.match(r"(decoder|mtp)\.layers\.\d+(\.mtp_model_layer\.layers\.\d+)?", row.module)
    assert match is not None, row.module
    return match[0]


def _draw_cells(axes: Axes, grid: _Grid) -> None:
    """The decoder and, beside it, MTP; a line between blocks."""
    colours = ListedColormap([_COLOURS[name] for name in FORMATS])
    rows = np.arange(len(grid.roles) + 1)
    stems = _stems(grid.roles)
    between = [index for index in range(1, len(stems)) if stems[index] != stems[index - 1]]
    for first, last, shift in ((0, grid.depth, 0.0), (grid.depth, len(grid.columns), _GAP)):
        if first == last:
            continue
        edges = np.arange(first, last + 1) + shift
        axes.axvspan(edges[0], edges[-1], color=_BED, linewidth=0)
        values = grid.cells[:, first:last]
        axes.pcolormesh(
            edges, rows, values, cmap=colours, vmin=0, vmax=len(FORMATS) - 1, edgecolors="white", linewidth=0.8
        )
        axes.hlines(between, edges[0], edges[-1], color=FAINT, linewidth=0.8)


def _stems(roles: Sequence[Role]) -> list[str]:
    return [role.partition(".")[0] for role in roles]


def _label_roles(axes: Axes, grid: _Grid) -> None:
    """Leaves beside their rows, blocks further left."""
    roles = grid.roles
    axes.set_yticks([index + 0.5 for index in range(len(roles))], [role.partition(".")[2] for role in roles])
    stems = _stems(roles)
    for stem in dict.fromkeys(stems):
        first, count = stems.index(stem), stems.count(stem)
        # In inches from the axes' left edge, so that every width looks the same.
        axes.annotate(
            _BLOCKS[stem],
            xy=(0, first + count / 2),
            xycoords=("axes fraction", "data"),
            xytext=(-(_LEFT - _MARGIN) * 72, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
            color=INK,
        )
    axes.tick_params(axis="y", length=0, labelsize=8, labelcolor=INK)


def _label_layers(axes: Axes, grid: _Grid) -> None:
    step = 10 if grid.depth > 60 else 5 if grid.depth > 20 else 1
    ticks = [layer for layer in range(0, grid.depth, step) if grid.depth - 1 - layer >= step / 2]
    ticks.append(grid.depth - 1)
    axes.set_xticks([layer + 0.5 for layer in ticks], [str(layer) for layer in ticks])
    axes.tick_params(axis="x", length=3, labelsize=8, color=FAINT, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)
    _below(axes, grid.depth / 2, 24, "decoder layer")
    if beside := len(grid.columns) - grid.depth:
        _below(axes, grid.depth + _GAP + beside / 2, 6, "MTP")


def _below(axes: Axes, x: float, points: float, text: str) -> None:
    """Text centred under column ``x``, so many points below the cells."""
    axes.annotate(
        text,
        xy=(x, 0),
        xycoords=("data", "axes fraction"),
        xytext=(0, -points),
        textcoords="offset points",
        ha="center",
        va="top",
        fontsize=8,
        color=INK,
    )


def _draw_legend(figure: Figure, rows: Sequence[PlanRow]) -> None:
    counts = {name: sum(row.format == name for row in rows) for name in FORMATS}
    figure.legend(
        handles=[Patch(color=_COLOURS[name], label=f"{name}  {count}") for name, count in counts.items() if count],
        loc="upper right",
        ncols=len(FORMATS),
        frameon=False,
        fontsize=9,
        title="modules by format",
        title_fontsize=8,
        handlelength=1.1,
        handleheight=1.0,
        columnspacing=1.4,
    )
