"""Pictures of a run's health: layers by steps, roles over steps, and the speed with what disturbed it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from nemotron3_megatron.config.sizes import KINDS
from nemotron3_megatron.drawing import EMPTY, FAINT, INK, plain
from nemotron3_megatron.telemetry.health import SERIES, layer_order
from nemotron3_megatron.telemetry.records import StepRecord

type Array = npt.NDArray[np.float64]

_COLOURS = {"max_violation": "magma_r", "router_bias_range": "magma_r"}
_OTHER_COLOURS = "viridis"
_PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}
_MOST_LABELS = 28
"""Rows that can be named beside a panel without touching."""


def draw_layer_maps(path: Path, steps: Sequence[StepRecord], *, pattern: str, title: str) -> None:
    """Write a PNG: one heat map a series, layers down, measured steps across.

    Args:
        path: where to write.
        steps: of which those with health are drawn; at least one.
        pattern: of the decoder, for the layers' names.
        title: heading.

    Raises:
        ValueError: nothing was measured.
    """
    measured = _measured(steps)
    names = [n for n, s in SERIES.items() if s.by == "layer" and any(n in record.health for record in measured)]
    down = math.ceil(len(names) / 2)
    figure = _figure(13, 0.9 + 3.9 * down, title)
    panels = figure.subplots(down, 2, squeeze=False).flatten()
    figure.subplots_adjust(
        left=0.085, right=0.955, top=1 - 0.85 / (0.9 + 3.9 * down), bottom=0.07, hspace=0.3, wspace=0.27
    )
    for axes, name in zip(panels, names, strict=False):
        _draw_layers(figure, axes, name, measured, pattern)
    for axes in panels[len(names) :]:
        axes.set_visible(False)
    figure.savefig(path)


def draw_role_curves(path: Path, steps: Sequence[StepRecord], *, title: str) -> None:
    """Write a PNG: gradient norm and share of zeros of each role, and how far MTP is from the main loss.

    Raises:
        ValueError: nothing was measured.
    """
    measured = _measured(steps)
    figure = _figure(13, 7.6, title)
    norms, zeros, gaps = figure.add_axes((0.07, 0.08, 0.37, 0.8)), *_right_hand(figure)
    x = [record.step for record in measured]
    for axes, name in ((norms, "role_gradient_norm"), (zeros, "role_gradient_zeros")):
        roles = sorted({role for record in measured for role in record.health.get(name, {})})
        table = {role: [record.health.get(name, {}).get(role, math.nan) for record in measured] for role in roles}
        _draw_roles(axes, x, table)
        axes.set_title(SERIES[name].title, loc="left", fontsize=10.5, color=INK)
    norms.set_yscale("log")
    _label_ends(norms, x, "role_gradient_norm", measured)
    zeros.set_ylim(bottom=0, top=max(zeros.get_ylim()[1], 0.01))
    zeros.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    _draw_gaps(gaps, steps)
    for axes in (norms, zeros, gaps):
        _plain(axes)
        axes.set_xlabel("step", color=FAINT)
    figure.savefig(path)


def draw_speed(path: Path, steps: Sequence[StepRecord], incidents: Mapping[str, Sequence[int]], *, title: str) -> None:
    """Write a PNG: tokens a second over steps with the median, step times as a distribution, incidents as ticks.

    Args:
        path: where to write.
        steps: at least one.
        incidents: kind to the steps at which it happened.
        title: heading.
    """
    figure = _figure(13, 4.4, title)
    rate, times = figure.add_axes((0.07, 0.15, 0.55, 0.64)), figure.add_axes((0.7, 0.15, 0.27, 0.64))
    values = np.array([record.tokens_per_s for record in steps])
    x = [record.step for record in steps]
    rate.plot(x, values, color="#1f6fb2", linewidth=0.9, alpha=0.75)
    middle = float(np.median(values))
    rate.axhline(middle, color=INK, linewidth=1.0, linestyle=(0, (5, 4)))
    rate.annotate(f"median {middle:,.0f}", (1, middle), xycoords=("axes fraction", "data"), xytext=(-4, 5),
                  textcoords="offset points", ha="right", fontsize=9, color=INK, bbox=_PAPER)  # fmt: skip
    rate.set_ylim(0, float(np.percentile(values, 99.5)) * 1.15 or 1)
    _mark(rate, incidents)
    rate.set_title("Tokens a second, all ranks together", loc="left", fontsize=10.5, color=INK, pad=14)
    rate.yaxis.set_major_formatter(EngFormatter(sep=""))
    rate.set_xlabel("step", color=FAINT)
    seconds = np.array([record.step_time_s for record in steps])
    shown = seconds[seconds <= np.percentile(seconds, 99)]
    times.hist(shown, bins=min(40, max(8, len(shown) // 6)), color="#8fb8dc")
    for share in (50, 95):
        at = float(np.percentile(seconds, share))
        times.axvline(at, color=INK, linewidth=1.0, linestyle=(0, (5, 4)))
        times.annotate(f"p{share} {at:.3g} s", (at, 1), xycoords=("data", "axes fraction"), xytext=(0, 4), ha="center",
                       textcoords="offset points", fontsize=9, color=INK)  # fmt: skip
    times.set_title("Seconds of a step (without the slowest 1 %)", loc="left", fontsize=10.5, color=INK, pad=14)
    times.set_xlabel("seconds", color=FAINT)
    for axes in (rate, times):
        _plain(axes)
    figure.savefig(path)


def _measured(steps: Sequence[StepRecord]) -> list[StepRecord]:
    found = [record for record in steps if record.health]
    if not found:
        raise ValueError("no step with health was recorded")
    return found


def _figure(width: float, height: float, title: str) -> Figure:
    figure = Figure(figsize=(width, height), dpi=130, facecolor="white")
    FigureCanvasAgg(figure)
    figure.text(0.02, 1 - 0.36 / height, title, fontsize=14, fontweight="bold", color=INK)
    return figure


def _right_hand(figure: Figure) -> tuple[Axes, Axes]:
    return figure.add_axes((0.63, 0.56, 0.34, 0.32)), figure.add_axes((0.63, 0.08, 0.34, 0.32))


def _draw_layers(figure: Figure, axes: Axes, name: str, measured: Sequence[StepRecord], pattern: str) -> None:
    rows = sorted({row for record in measured for row in record.health.get(name, {})}, key=layer_order)
    cells = np.array([[record.health.get(name, {}).get(row, math.nan) for record in measured] for row in rows])
    colours = colormaps[_COLOURS.get(name, _OTHER_COLOURS)].with_extremes(bad=EMPTY)
    positive = cells[np.isfinite(cells) & (cells > 0)]
    logarithmic = SERIES[name].colours == "logarithmic" and positive.size > 0
    norm = LogNorm(positive.min(), max(positive.max(), positive.min() * 1.01)) if logarithmic else Normalize()
    cells = np.where(np.isfinite(cells), cells, np.nan)
    edges = _edges([record.step for record in measured])
    mesh = axes.pcolormesh(edges, np.arange(len(rows) + 1), cells, cmap=colours, norm=norm)
    axes.invert_yaxis()
    every = math.ceil(len(rows) / _MOST_LABELS)
    axes.set_yticks(np.arange(0, len(rows), every) + 0.5, [_layer_name(row, pattern) for row in rows[::every]])
    axes.tick_params(colors=FAINT, labelsize=8, length=0)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    axes.spines[:].set_visible(False)
    axes.set_title(SERIES[name].title, loc="left", fontsize=10.5, color=INK)
    axes.set_xlabel("step", color=FAINT, fontsize=9)
    bar = figure.colorbar(mesh, ax=axes, pad=0.015, fraction=0.04)
    bar.ax.tick_params(which="both", colors=FAINT, labelsize=8, length=0)
    bar.outline.set_visible(False)


def _layer_name(row: str, pattern: str) -> str:
    kind = KINDS.get(pattern[int(row)]) if row.isdigit() and int(row) < len(pattern) else None
    return f"{row} {kind}" if kind else row


def _edges(steps: Sequence[int]) -> Array:
    """Borders between measured steps, half-way; the first and the last cell are as wide as their neighbours."""
    at = np.asarray(steps, dtype=np.float64)
    if len(at) == 1:
        return np.array([at[0] - 0.5, at[0] + 0.5])
    middle = (at[1:] + at[:-1]) / 2
    return np.concatenate([[2 * at[0] - middle[0]], middle, [2 * at[-1] - middle[-1]]])


def _draw_roles(axes: Axes, x: Sequence[int], table: Mapping[str, Sequence[float]]) -> None:
    colours = _role_colours(list(table))
    for role, values in table.items():
        axes.plot(x, values, color=colours[role], linewidth=1.3, marker="o" if len(x) == 1 else None, markersize=3)


def _role_colours(roles: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Roles of one kind of layer (the word before the dot) have neighbouring colours."""
    palette = colormaps["turbo"](np.linspace(0.03, 0.95, max(len(roles), 2)))
    return dict(zip(roles, map(tuple, palette), strict=False))


def _label_ends(axes: Axes, x: Sequence[int], name: str, measured: Sequence[StepRecord]) -> None:
    """Names of roles in the right margin, in the order of their last values and evenly apart."""
    last = {role: value for role, value in measured[-1].health.get(name, {}).items() if value > 0}
    roles = sorted({role for record in measured for role in record.health.get(name, {})})
    colours = _role_colours(roles)
    ordered = sorted(last, key=lambda role: last[role])
    for place, role in enumerate(ordered):
        height = (place + 0.5) / len(ordered)
        axes.annotate(
            f"{role}  {last[role]:.2g}",
            xy=(x[-1], last[role]),
            xytext=(1.05, height),
            textcoords="axes fraction",
            fontsize=8.5,
            va="center",
            color=tuple(0.75 * c for c in colours[role][:3]),
            arrowprops={
                "arrowstyle": "-",
                "color": colours[role],
                "linewidth": 0.6,
                "shrinkA": 1,
                "shrinkB": 0,
                "relpos": (0, 0.5),
            },
            annotation_clip=False,
        )


def _draw_gaps(axes: Axes, steps: Sequence[StepRecord]) -> None:
    depths = max(len(record.mtp_losses) for record in steps)
    x = [record.step for record in steps]
    for depth in range(depths):
        gaps = [dict(enumerate(r.mtp_losses)).get(depth, math.nan) - r.loss for r in steps]
        axes.plot(
            x, gaps, linewidth=1.3, color=("#1f6fb2", "#d9480f", "#2b8a3e")[depth % 3], label=f"depth {depth + 1}"
        )
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_title("MTP loss minus main loss (nats)", loc="left", fontsize=10.5, color=INK)
    if depths:
        axes.legend(frameon=False, fontsize=9, labelcolor=INK)
    else:
        axes.text(0.5, 0.5, "no MTP in this model", transform=axes.transAxes, ha="center", color=FAINT)


_MARKS = {
    "start": "#2b8a3e", "end": "#2b8a3e", "refused": "#c92a2a", "spike": "#c92a2a", "transient": "#5f3dc4",
    "rollback": "#e67700", "straggler": "#66727f", "failure": "#c92a2a",
}  # fmt: skip


def _mark(axes: Axes, incidents: Mapping[str, Sequence[int]]) -> None:
    for kind, at in incidents.items():
        axes.plot(at, [1.03] * len(at), "v", color=_MARKS.get(kind, INK), markersize=6, label=kind, clip_on=False,
                  transform=axes.get_xaxis_transform())  # fmt: skip
    if incidents:
        axes.legend(frameon=False, ncols=len(incidents), fontsize=8.5, loc="lower right", labelcolor=INK,
                    bbox_to_anchor=(1, 1.04), handletextpad=0.1, columnspacing=1.0)  # fmt: skip


def _plain(axes: Axes) -> None:
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
