from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config.duration import Duration

UNITS = st.sampled_from(["tokens", "steps", "seconds"])


@pytest.mark.parametrize(
    ("text", "value", "unit"),
    [
        ("20T tokens", 20e12, "tokens"),
        ("23.5T tokens", 23.5e12, "tokens"),
        ("24_991_611_396_096 tokens", 24991611396096, "tokens"),
        ("1 step", 1, "steps"),
        ("500 steps", 500, "steps"),
        ("90 min", 5400, "seconds"),
        ("2 h", 7200, "seconds"),
    ],
)
def test_reads_the_written_forms(text: str, value: float, unit: str) -> None:
    assert Duration.parse(text) == Duration(value, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "text", ["500", "steps", "-3 steps", "5 parsecs", "1e3 steps", "5 M tokens x", "9" * 400 + " steps"]
)
def test_refuses_other_forms_and_shows_a_right_one(text: str) -> None:
    with pytest.raises(ValueError, match="500 steps"):
        Duration.parse(text)


@given(st.floats(min_value=0, max_value=1e18, allow_nan=False), UNITS)
def test_text_reads_back_exactly(value: float, unit: str) -> None:
    duration = Duration(value, unit)  # type: ignore[arg-type]
    assert Duration.parse(str(duration)) == duration


@given(st.integers(1, 10**15), st.integers(1, 10**9))
def test_steps_cover_the_tokens_and_no_step_is_wasted(tokens: int, per_step: int) -> None:
    steps = Duration(tokens, "tokens").in_steps(per_step)
    # Tokens above 2**53 are not exact in a float; below, ceil of a float quotient may be off by the rounding of one
    # division, which matters only where the quotient is within 1 ulp of an integer.
    assert abs(steps - math.ceil(tokens / per_step)) == 0
    assert steps * per_step >= tokens * (1 - 2**-52)


def test_wall_clock_time_is_no_number_of_steps() -> None:
    with pytest.raises(ValueError, match="wall-clock"):
        Duration(60, "seconds").in_steps(10)
