"""The memory plan as a picture: a stacked bar a pipeline rank, against the GPUs' sizes."""

from __future__ import annotations

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from nemotron3_megatron.accelerators import Gpu
from nemotron3_megatron.drawing import FAINT, INK
from nemotron3_megatron.plan.memory import GIB, TERMS, Memory, MemoryPlan

_COLOURS = {
    "weights": "#1d4e89",
    "gradients": "#4f86c6",
    "optimizer": "#a9c6e8",
    "activations": "#f2ac33",
    "logits": "#d9722e",
    "transient": "#8c3b2a",
    "quantised_weights": "#1f8a5b",
    "workspace": "#b5bdc5",
}
"""What stays from step to step in blue, what comes and goes with a micro-batch in warm colours."""

_BAR, _LEFT, _RIGHT, _TOP, _BOTTOM = 0.42, 1.15, 0.55, 1.0, 0.9  # inches
_WIDTH = 9.0
_NARROWEST = 0.035
"""Of the axis: narrower parts of a bar bear no number."""

_REACH = 2.7
"""Times the longest bar: GPUs beyond are not marked."""


def draw_memory(path: Path, plan: MemoryPlan, gpus: tuple[Gpu, ...], title: str, subtitle: str) -> None:
    """Write a PNG.

    Args:
        path: where to write; its directory is made.
        plan: what is drawn.
        gpus: whose memory is marked, as far as it lies within reach of the bars.
        title: heading.
        subtitle: smaller, below it.

    Raises:
        OSError: the file cannot be written.
    """
    bars = len(plan.ranks)
    height = _TOP + max(bars, 2) * _BAR + _BOTTOM
    figure = Figure(figsize=(_WIDTH, height), dpi=160, facecolor="white")
    FigureCanvasAgg(figure)
    width, left = 1 - (_LEFT + _RIGHT) / _WIDTH, _LEFT / _WIDTH
    axes = figure.add_axes((left, _BOTTOM / height, width, 1 - (_TOP + _BOTTOM) / height))
    largest = plan.fullest.total / GIB
    marked = [gpu for gpu in gpus if gpu.memory_gib < _REACH * largest]
    limit = 1.08 * max([1.06 * largest, *(gpu.memory_gib for gpu in marked)])
    axes.set_xlim(0, limit)
    axes.set_ylim(max(bars, 2) - 0.5, -0.5)
    for rank, memory in enumerate(plan.ranks):
        _draw_bar(axes, rank if bars > 1 else 0.5, memory, limit)
    _mark(axes, marked)
    axes.set_yticks(list(range(bars)) if bars > 1 else [0.5], [f"pipeline rank {rank}" for rank in range(bars)])
    axes.tick_params(length=0, labelsize=8, colors=FAINT)
    axes.set_xlabel("GiB on the fullest GPU", fontsize=8, color=FAINT)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.012, 0.01), ncols=8, fontsize=7.5, frameon=False,
                  handlelength=1.0, columnspacing=1.1)  # fmt: skip
    figure.text(0.018, 1 - 0.34 / height, title, fontsize=13, fontweight="bold", color=INK)
    figure.text(0.018, 1 - 0.6 / height, subtitle, fontsize=8.5, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def _draw_bar(axes: Axes, place: float, memory: Memory, limit: float) -> None:
    start, digits = 0.0, 1 if limit > 10 else 2
    for name in TERMS:
        value = getattr(memory, name) / GIB
        label = name.replace("_", " ") if place in (0, 0.5) else None
        axes.barh(place, value, left=start, height=0.62, color=_COLOURS[name], label=label, zorder=2)
        if value > _NARROWEST * limit:
            colour = INK if name in ("optimizer", "activations", "workspace") else "white"
            middle = start + value / 2
            axes.text(
                middle, place, f"{value:.{digits}f}", ha="center", va="center", fontsize=7.5, color=colour, zorder=3
            )
        start += value
    end, behind = start + 0.008 * limit, {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
    axes.text(end, place, f"{start:.{digits}f}", va="center", fontsize=8, fontweight="bold", color=INK, bbox=behind)


def _mark(axes: Axes, gpus: list[Gpu]) -> None:
    for gpu in gpus:
        axes.axvline(gpu.memory_gib, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
        axes.annotate(
            gpu.name.upper(),
            (gpu.memory_gib, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            fontsize=7.5,
            color=FAINT,
        )
