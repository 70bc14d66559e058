"""What all pictures look like."""

from __future__ import annotations

from matplotlib.axes import Axes

INK, FAINT, GRID, EMPTY = "#1f2933", "#66727f", "#e4e8ec", "#f4f6f8"
"""Colours of text and main lines, of labels, of grids, and of cells without a value."""


def plain(axes: Axes) -> None:
    """A faint grid behind the curves, and no frame."""
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(colors=FAINT, labelsize=9, length=0, which="both")
