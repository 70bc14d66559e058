"""The terminal plot: every point lies where its axes say."""

from __future__ import annotations

import itertools
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.telemetry.terminal_plot import Series, plot, ticks

_numbers = st.floats(-1e6, 1e6)


@given(_numbers, st.floats(1e-3, 1e6), st.integers(1, 12))
def test_ticks_are_few_even_and_inside(low: float, span: float, at_most: int) -> None:
    found = ticks(low, low + span, at_most)
    assert len(found) <= at_most
    assert all(low - 1e-6 * span <= value <= low + span + 1e-6 * span for value in found)
    gaps = [b - a for a, b in itertools.pairwise(found)]
    # Multiples of one spacing: equal up to the rounding of values of this size.
    assert all(gap == pytest.approx(gaps[0], rel=1e-6, abs=1e-9 * abs(low)) for gap in gaps)


def test_ticks_are_round_numbers() -> None:
    assert ticks(0, 100, 5) == [0, 25, 50, 75, 100]
    assert ticks(3.1, 8.3, 4) == [4, 6, 8]


@given(st.lists(st.tuples(_numbers, _numbers), min_size=1, max_size=40), st.integers(40, 120), st.integers(4, 30))
def test_no_line_is_wider_than_asked(points: list[tuple[float, float]], width: int, height: int) -> None:
    points = sorted(points)
    text = plot([Series("a", [x for x, _ in points], [y for _, y in points], "blue")], width=width, height=height)
    lines = text.plain.split("\n")
    assert len(lines) == height + 3
    assert max(map(len, lines)) <= width


def test_marks_stand_at_the_heights_of_their_labels() -> None:
    values = [3.0, 5.0, 7.0, 9.0]
    lines = plot([Series("v", [1, 2, 3, 4], values, "red", mark="●")], width=60, height=20).plain.split("\n")[:20]
    heights = {index: float(match[1]) for index, line in enumerate(lines) if (match := re.match(r" *([\d.]+) ┤", line))}
    marks = [(line.index("●"), index) for index, line in enumerate(lines) if "●" in line]
    assert len(marks) == 4
    rows = [row for _, row in sorted(marks)]  # left to right
    per_row = (heights[min(heights)] - heights[max(heights)]) / (max(heights) - min(heights))
    for row, value in zip(rows, values, strict=True):
        estimate = heights[min(heights)] - (row - min(heights)) * per_row
        assert estimate == pytest.approx(value, abs=1.5 * per_row)  # a label and a mark are each within half a row


def test_a_line_joins_its_points_without_gaps() -> None:
    text = plot([Series("v", [0, 1], [0.0, 1.0], "red")], width=60, height=10)
    rows = [line for line in text.plain.split("\n")[:10]]
    drawn = {column for row in rows for column, cell in enumerate(row) if "\u2800" < cell <= "\u28ff"}
    assert drawn == set(range(min(drawn), 60))


def test_points_that_are_not_finite_are_left_out() -> None:
    a = plot([Series("v", [1, 2, 3], [1.0, math.nan, 2.0], "red", mark="x")], width=60)
    b = plot([Series("v", [1, 3], [1.0, 2.0], "red", mark="x")], width=60)
    assert a.plain == b.plain


@pytest.mark.parametrize("values", [[], [math.nan, math.inf]])
def test_nothing_to_plot_is_an_error(values: list[float]) -> None:
    with pytest.raises(ValueError, match="no finite point"):
        plot([Series("v", range(len(values)), values, "red")])


def test_a_flat_line_and_a_single_point_have_axes() -> None:
    for values in ([2.0, 2.0], [2.0]):
        assert "┤" in plot([Series("v", range(len(values)), values, "red")], width=40).plain
