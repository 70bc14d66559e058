"""Blends: shares hold at every prefix, and counts alone are enough to go on."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.blend import Blend

WEIGHTS = st.lists(
    st.one_of(st.integers(1, 50).map(float), st.floats(0.001, 1.0).map(lambda x: round(x, 4))), min_size=1, max_size=12
).map(lambda weights: {f"source{i}": weight for i, weight in enumerate(weights)})


@settings(max_examples=200, deadline=None)
@given(weights=WEIGHTS, samples=st.integers(1, 400))
def test_shares_are_within_one_sample_at_every_prefix(weights: dict[str, float], samples: int) -> None:
    total = sum(Fraction(repr(weight)) for weight in weights.values())
    counts = dict.fromkeys(weights, 0)
    for drawn, name in enumerate(Blend(weights).draw({}, samples), start=1):
        counts[name] += 1
        for other, weight in weights.items():
            assert abs(counts[other] - drawn * Fraction(repr(weight)) / total) < 1


@settings(max_examples=100, deadline=None)
@given(weights=WEIGHTS, parts=st.lists(st.integers(0, 40), max_size=6))
def test_resuming_from_counts_equals_uninterrupted(weights: dict[str, float], parts: list[int]) -> None:
    blend = Blend(weights)
    counts: dict[str, int] = {}
    drawn: list[str] = []
    for part in parts:
        turns = blend.draw(counts, part)
        drawn += turns
        counts = {name: drawn.count(name) for name in set(drawn)}
    assert drawn == Blend(weights).draw({}, sum(parts))


def test_order_of_the_recipe_and_scale_do_not_matter() -> None:
    assert Blend({"a": 0.3, "b": 0.7}).draw({}, 50) == Blend({"b": 7, "a": 3}).draw({}, 50)


def test_weight_zero_is_never_drawn() -> None:
    assert set(Blend({"a": 0.0, "b": 1.0}).draw({}, 20)) == {"b"}


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0}, {"a": float("nan")}, {"a": float("inf"), "b": 1.0}])
def test_unusable_weights(weights: dict[str, float]) -> None:
    with pytest.raises(UserError):
        Blend(weights)
