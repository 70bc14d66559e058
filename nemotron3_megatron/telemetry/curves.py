"""The loss-curve figure of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from nemotron3_megatron.drawing import FAINT, INK, plain
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord

type Array = npt.NDArray[np.float64]

_TRAIN, _VALIDATION, _UNIGRAM, _RATE, _REFUSED = "#1f6fb2", "#d9480f", "#5f3dc4", "#2b8a3e", "#c92a2a"
_MTP = ("#8c9bab", "#b9c3cd", "#d3dae0")


def smoothed(values: Sequence[float], share: float = 0.02) -> Array:
    """Moving average with a Gaussian window; it does not lag, and values that are not finite are bridged.

    The window is narrow at the beginning, where losses fall fastest, and has its full width after a few windows.

    Args:
        values: (n,) one value a step.
        share: standard deviation of the window as a share of n (between 1 and 50 values).

    Returns:
        (n,) float64; NaN where no finite value is within three standard deviations.
    """
    raw = np.asarray(values, dtype=np.float64)
    sigma = min(max(len(raw) * share, 1.0), 50.0)
    start = np.exp(-np.arange(len(raw)) / (2 * sigma))
    wide, narrow = _gaussian_average(raw, sigma), _gaussian_average(raw, max(sigma / 4, 1.0))
    return np.where(np.isfinite(narrow), start * narrow + (1 - start) * wide, wide)


def _gaussian_average(raw: Array, sigma: float) -> Array:
    finite = np.isfinite(raw)
    reach = math.ceil(3 * sigma)
    window = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    weight = np.convolve(finite.astype(np.float64), window)[reach : reach + len(raw)]
    total = np.convolve(np.where(finite, raw, 0.0), window)[reach : reach + len(raw)]
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(weight > 0, total / weight, np.nan)


def draw_loss_curve(
    path: Path,
    steps: Sequence[StepRecord],
    evals: Sequence[EvalRecord],
    *,
    title: str,
    unigram_entropy: float | None = None,
) -> None:
    """Write a PNG (1760 x 1120 pixels): losses over steps and tokens, the learning rate below.

    Args:
        path: where to write.
        steps: at least one.
        evals: may be empty.
        title: heading.
        unigram_entropy: nats per token; drawn as a line when given.

    Raises:
        ValueError: ``steps`` is empty.
    """
    if not steps:
        raise ValueError("no step to draw")
    figure = Figure(figsize=(11, 7), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(5, 1))
    figure.subplots_adjust(left=0.08, right=0.875, top=0.87, bottom=0.08, hspace=0.09)
    figure.text(0.08, 0.95, title, fontsize=15, fontweight="bold", color=INK)
    ends = _draw_losses(losses, steps, evals, unigram_entropy)
    _draw_rate(rates, steps)
    for axes in (losses, rates):
        plain(axes)
    _limit(losses, steps, evals, unigram_entropy)
    _label_ends(losses, ends)
    _token_axis(losses, steps)
    rates.set_xlabel("step", color=FAINT)
    rates.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.align_ylabels()
    figure.savefig(path)


def _draw_losses(
    axes: Axes, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], unigram_entropy: float | None
) -> list[tuple[float, str, str]]:
    """Draw all losses; returns (last value, label, colour) of each for the right margin."""
    x = [record.step for record in steps]
    ends: list[tuple[float, str, str]] = []
    for depth in range(max(len(record.mtp_losses) for record in steps)):
        values = smoothed([dict(enumerate(record.mtp_losses)).get(depth, math.nan) for record in steps])
        colour = _MTP[min(depth, len(_MTP) - 1)]
        axes.plot(x, values, color=colour, linewidth=1.2, label=f"MTP depth {depth + 1}", zorder=2)
        ends.append((float(values[-1]), f"MTP {depth + 1}", "#7b8794"))
    raw = [record.loss for record in steps]
    line = smoothed(raw)
    axes.plot(x, raw, color=_TRAIN, linewidth=0.7, alpha=0.4, zorder=3)
    axes.plot(x, line, color=_TRAIN, linewidth=2.0, label="train", zorder=4)
    ends.append((float(line[-1]), "train", _TRAIN))
    if evals:
        axes.plot(
            [record.step for record in evals],
            [record.validation_loss for record in evals],
            color=_VALIDATION,
            linewidth=1.2,
            marker="o",
            markersize=5.5,
            markeredgecolor="white",
            markeredgewidth=0.9,
            label="validation",
            zorder=5,
        )
        ends.append((evals[-1].validation_loss, "validation", _VALIDATION))
    if unigram_entropy is not None:
        axes.axhline(unigram_entropy, color=_UNIGRAM, linewidth=1.2, linestyle=(0, (5, 4)), zorder=1)
        ends.append((unigram_entropy, "unigram", _UNIGRAM))
    refused = [record.step for record in steps if record.skipped]
    if refused:
        axes.plot(
            refused,
            [0.015] * len(refused),
            "|",
            color=_REFUSED,
            markersize=9,
            markeredgewidth=1.5,
            transform=axes.get_xaxis_transform(),
            label="update refused",
            zorder=6,
        )
    axes.set_ylabel("loss (nats per token)", color=FAINT)
    axes.legend(frameon=False, loc="upper right", labelcolor=INK, fontsize=10)
    return ends


def _draw_rate(axes: Axes, steps: Sequence[StepRecord]) -> None:
    x, rates = [record.step for record in steps], [record.lr for record in steps]
    axes.plot(x, rates, color=_RATE, linewidth=1.5)
    axes.fill_between(x, rates, color=_RATE, alpha=0.1, linewidth=0)
    peak = max(rates)
    axes.set_ylim(0, peak * 1.12 or 1)
    axes.set_yticks([0, peak / 2, peak] if peak > 0 else [0])
    axes.set_ylabel("learning rate", color=FAINT)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def _limit(axes: Axes, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], unigram_entropy: float | None) -> None:
    """Let neither the first steps nor a spike flatten the rest: the top is the 99.7th percentile."""
    train = [record.loss for record in steps if math.isfinite(record.loss)]
    shown = train + [record.validation_loss for record in evals if math.isfinite(record.validation_loss)]
    shown += [loss for record in steps for loss in record.mtp_losses if math.isfinite(loss)]
    shown += [] if unigram_entropy is None else [unigram_entropy]
    if shown:
        low, high = min(shown), max(float(np.percentile(shown, 99.7)), unigram_entropy or -math.inf)
        margin = (high - low) * 0.06 or 0.5
        axes.set_ylim(low - margin, high + margin)
    first, last = steps[0].step, max(steps[-1].step, steps[0].step + 1)
    axes.set_xlim(first - (last - first) * 0.01, last + (last - first) * 0.01)


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at its end in the right margin, moved apart where labels would touch."""
    low, high = axes.get_ylim()
    gap = (high - low) * 0.043
    place = -math.inf
    for value, name, colour in sorted(end for end in ends if math.isfinite(end[0])):
        place = max(min(value, high), place + gap)
        axes.annotate(
            f"{name} {value:.3f}",
            xy=(1.0, place),
            xycoords=("axes fraction", "data"),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            fontsize=9.5,
            color=colour,
            annotation_clip=False,
        )


def _token_axis(axes: Axes, steps: Sequence[StepRecord]) -> None:
    """Tokens seen, along the top; piecewise linear in steps, since stages differ in tokens a step."""
    if len(steps) < 2:
        return
    x = np.array([record.step for record in steps], dtype=np.float64)
    tokens = np.array([record.tokens for record in steps], dtype=np.float64)
    if np.any(np.diff(tokens) <= 0):
        return
    top = axes.secondary_xaxis(
        "top", functions=(lambda step: _interpolate(step, x, tokens), lambda count: _interpolate(count, tokens, x))
    )
    top.set_xlabel("tokens", color=FAINT)
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.tick_params(colors=FAINT, labelsize=9, length=0)
    top.spines["top"].set_visible(False)


def _interpolate(places: npt.ArrayLike, x: Array, y: Array) -> Array:
    """Piecewise linear, continued linearly on both sides."""
    at = np.asarray(places, dtype=np.float64)
    inner = np.interp(at, x, y)
    slopes = (y[1] - y[0]) / (x[1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    below, above = np.minimum(at - x[0], 0.0) * slopes[0], np.maximum(at - x[-1], 0.0) * slopes[1]
    return np.asarray(inner + below + above, dtype=np.float64)
