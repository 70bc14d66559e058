"""A line plot in braille characters: 2 x 4 dots a character, for terminals 80 columns wide."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.text import Text

_BLANK = 0x2800
_DOT_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
"""Bit of the dot in row r, column c of a braille character (Unicode standard, block 2800-28FF)."""
_DOTS_X, _DOTS_Y = 2, 4
_FLAT = 1e-9
"""Values closer than this are drawn as equal; labels that tell them apart would not fit."""
_TICK_STEPS = (1.0, 2.0, 2.5, 5.0, 10.0)


@dataclass(frozen=True, slots=True)
class Series:
    """Points to draw; ``x`` ascending, points that are not finite are left out."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    style: str
    """A rich style, such as ``cyan`` or ``bold yellow``."""
    mark: str = ""
    """One character drawn at each point; empty: the points are joined by a line."""
    line: Literal["solid", "dashed"] = "solid"


def ticks(low: float, high: float, at_most: int) -> list[float]:
    """Round numbers inside [low, high], evenly spaced, at most ``at_most`` of them."""
    span = high - low
    if span <= 0 or at_most < 1:
        return [low]
    raw = span / at_most
    scale = 10.0 ** math.floor(math.log10(raw))
    for factor in (*_TICK_STEPS, 20.0):
        spacing = factor * scale
        first, last = math.ceil(low / spacing - 1e-9), math.floor(high / spacing + 1e-9)
        if last - first + 1 <= at_most:
            return [index * spacing for index in range(first, last + 1)]
    raise AssertionError("unreachable: a spacing of 20 raw steps leaves one tick")


def plot(series: Sequence[Series], *, width: int = 78, height: int = 16, x_label: str = "") -> Text:
    """Draw ``series`` on common axes.

    Args:
        series: later ones are drawn over earlier ones.
        width: characters a line takes, axis labels included.
        height: lines of the plotting area; axis and legend take three more.
        x_label: unit of the x axis.

    Raises:
        ValueError: there is no finite point, or the area is too small.
    """
    points = [
        [(x, y) for x, y in zip(one.x, one.y, strict=True) if math.isfinite(x) and math.isfinite(y)] for one in series
    ]
    flat = [point for one in points for point in one]
    if not flat:
        raise ValueError("nothing to plot: no finite point")
    y_low, y_high = _padded(min(y for _, y in flat), max(y for _, y in flat))
    x_low, x_high = min(x for x, _ in flat), max(x for x, _ in flat)
    if x_high - x_low < _FLAT:
        x_high = x_low + 1
    y_ticks = ticks(y_low, y_high, max(height // 3, 2))
    labels = _tick_labels(y_ticks)
    margin = max(map(len, labels)) + 2
    columns = width - margin
    if columns < 10 or height < 4:
        raise ValueError(f"{width} x {height} characters are too few to plot in")
    canvas = _Canvas(columns, height, (x_low, x_high), (y_low, y_high))
    for one, kept in zip(series, points, strict=True):
        canvas.draw(one, kept)
    label_rows = {canvas.row(value): label for value, label in zip(y_ticks, labels, strict=True)}
    text = Text()
    for index, row in enumerate(canvas.rows()):
        label = label_rows.get(index, "")
        text.append(f"{label:>{margin - 2}} ", "dim").append("┤" if label else "│", "dim").append_text(row).append("\n")
    end = f" {x_label}" if x_label else ""
    text.append(" " * (margin - 1) + "└" + "─" * (columns - len(end)) + end + "\n", "dim")
    text.append(_x_axis(x_low, x_high, columns, margin) + "\n", "dim")
    return text.append_text(_legend(series, margin))


class _Canvas:
    """Braille dots with one style a character."""

    def __init__(self, columns: int, height: int, x: tuple[float, float], y: tuple[float, float]) -> None:
        self._columns, self._height = columns, height
        self._x, self._y = x, y
        self._bits = [[0] * columns for _ in range(height)]
        self._marks = [[""] * columns for _ in range(height)]
        self._styles = [[""] * columns for _ in range(height)]

    def dot(self, x: float, y: float) -> tuple[int, int]:
        """Dot (column, row from the top) of a point."""
        across = (x - self._x[0]) / (self._x[1] - self._x[0]) * (self._columns * _DOTS_X - 1)
        down = (self._y[1] - y) / (self._y[1] - self._y[0]) * (self._height * _DOTS_Y - 1)
        return round(across), round(down)

    def row(self, y: float) -> int:
        """Line of characters, from the top, that value ``y`` falls in."""
        return self.dot(self._x[0], y)[1] // _DOTS_Y

    def draw(self, series: Series, points: list[tuple[float, float]]) -> None:
        dots = [self.dot(x, y) for x, y in points]
        if series.mark:
            for column, row in dots:
                self._marks[row // _DOTS_Y][column // _DOTS_X] = series.mark
                self._styles[row // _DOTS_Y][column // _DOTS_X] = series.style
            return
        for start, end in zip(dots, dots[1:] or dots, strict=False):
            length = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
            for part in range(length + 1):
                column = start[0] + round((end[0] - start[0]) * part / length)
                if series.line == "solid" or column % 4 < 2:
                    self._set(column, start[1] + round((end[1] - start[1]) * part / length), series.style)

    def rows(self) -> list[Text]:
        lines = []
        for bits, marks, styles in zip(self._bits, self._marks, self._styles, strict=True):
            line = Text()
            for bit, mark, style in zip(bits, marks, styles, strict=True):
                line.append(mark or (chr(_BLANK + bit) if bit else " "), style)
            lines.append(line)
        return lines

    def _set(self, column: int, row: int, style: str) -> None:
        self._bits[row // _DOTS_Y][column // _DOTS_X] |= _DOT_BITS[row % _DOTS_Y][column % _DOTS_X]
        self._styles[row // _DOTS_Y][column // _DOTS_X] = style


def _padded(low: float, high: float) -> tuple[float, float]:
    margin = (high - low) * 0.04 if high - low >= _FLAT else max(abs(low) * 0.1, 0.5)
    return low - margin, high + margin


def _tick_labels(values: list[float]) -> list[str]:
    spacing = abs(values[1] - values[0]) if len(values) > 1 else abs(values[0]) or 1.0
    digits = max(0, -math.floor(math.log10(spacing) + 1e-9))
    digits += any(abs(round(value, digits) - value) > 1e-9 * max(abs(value), 1) for value in values)
    return [f"{value:.{digits}f}" for value in values]


def _x_axis(low: float, high: float, columns: int, margin: int) -> str:
    cells = [" "] * columns
    values = ticks(low, high, max(columns // 12, 2))
    for value, text in zip(values, _tick_labels(values), strict=True):
        centre = round((value - low) / (high - low) * (columns - 1))
        start = min(max(centre - len(text) // 2, 0), columns - len(text))
        cells[start : start + len(text)] = text
    return " " * margin + "".join(cells)


def _legend(series: Sequence[Series], margin: int) -> Text:
    text = Text(" " * margin)
    for one in series:
        sample = one.mark or ("⠉⠉" if one.line == "solid" else "⠁⠁")
        text.append(sample, one.style).append(f" {one.name}   ", "dim")
    text.rstrip()
    return text
