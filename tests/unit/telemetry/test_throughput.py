"""Estimates: exact on steady steps, unmoved by outliers."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.telemetry.throughput import (
    Pace,
    StepTimer,
    format_count,
    format_duration,
    remaining_seconds,
    tokens_per_second,
)

_durations = st.floats(1e-3, 1e3)


@given(_durations, st.integers(1, 30), st.integers(0, 10**6))
def test_steady_steps_give_their_time_times_what_remains(seconds: float, count: int, remaining: int) -> None:
    assert remaining_seconds([seconds] * count, remaining) == pytest.approx(seconds * remaining)


@given(st.lists(_durations, min_size=3, max_size=20), _durations)
def test_a_single_slow_step_keeps_the_estimate_among_the_others(times: list[float], stall: float) -> None:
    estimate = remaining_seconds([*times, 1e6 * (1 + stall)], 1)
    assert estimate is not None
    assert min(times) <= estimate <= max(times)


@pytest.mark.parametrize("recent", [[], [math.nan], [math.inf, math.nan]])
def test_nothing_measured_is_unknown(recent: list[float]) -> None:
    assert remaining_seconds(recent, 10) is None


def test_past_the_end_nothing_remains() -> None:
    assert remaining_seconds([2.0], -5) == 0.0


def test_warm_up_steps_are_forgotten_as_soon_as_others_are_measured() -> None:
    pace = Pace(warmup=2, window=3)
    assert pace.remaining(10) is None
    pace.add(100.0)
    assert pace.remaining(10) == 1000.0
    pace.add(50.0)
    assert pace.remaining(10) == 500.0
    pace.add(1.0)
    assert pace.remaining(10) == 10.0


def test_the_pace_follows_a_lasting_change() -> None:
    pace = Pace(warmup=0, window=4)
    for seconds in [1.0] * 10 + [3.0] * 4:
        pace.add(seconds)
    assert pace.remaining(2) == 6.0


def test_time_between_steps_does_not_count() -> None:
    ticks = iter([10.0, 12.5, 100.0, 101.0])
    timer = StepTimer(clock=lambda: next(ticks))
    timer.start()
    assert timer.stop() == 2.5
    timer.start()
    assert timer.stop() == 1.0
    with pytest.raises(ValueError, match="without start"):
        timer.stop()


def test_throughput_of_an_interval_too_short_to_measure() -> None:
    assert tokens_per_second(100, 4.0) == 25.0
    assert tokens_per_second(100, 0.0) == 0.0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (59.4, "59s"),
        (59.6, "1m00s"),
        (192, "3m12s"),
        (3599.9, "1h00m"),
        (7500, "2h05m"),
        (4 * 86400 + 3 * 3600, "4d03h"),
        (None, "--"),
        (math.inf, "--"),
    ],
)
def test_durations(seconds: float | None, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (999.6, "1.00k"), (12345, "12.3k"), (123456, "123k"), (4.56e6, "4.56M"), (20e12, "20.0T")],
)
def test_counts(value: float, text: str) -> None:
    assert format_count(value) == text


@given(st.floats(0, 1e16))
def test_counts_are_right_to_three_digits(value: float) -> None:
    text = format_count(value)
    unit = {"k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1.0)
    # Half a unit of the third digit of the smallest mantissa, 1.00: 0.5 %; whole numbers below 1000: 0.5.
    assert float(text.rstrip("kMBT")) * unit == pytest.approx(value, rel=5.1e-3, abs=0.5)
