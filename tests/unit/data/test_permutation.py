"""The keyed permutation is a bijection, reproducible, and looks random."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3_megatron.data.permutation import Permutation


@settings(max_examples=150, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_is_a_bijection(n: int, seed: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, seed, "source", 0).all()), np.arange(n))


def test_random_access_equals_the_whole() -> None:
    permutation = Permutation(1000, 3, "a", 1)
    assert [permutation[i] for i in range(50)] == permutation.all()[:50].tolist()
    assert len(permutation) == 1000


def test_every_part_of_the_key_matters() -> None:
    base = Permutation(1000, 1, "a", 0).all()
    for key in [(2, "a", 0), (1, "b", 0), (1, "a", 1)]:
        # A random permutation of n has one fixed point on average; agreement of two is the same.
        assert (Permutation(1000, *key).all() == base).sum() < 10
    assert np.array_equal(Permutation(1000, 1, "a", 0).all(), base)


def test_works_beyond_memory() -> None:
    n = 10**15
    places = Permutation(n, 5).of(np.arange(2000, dtype=np.int64))
    assert len(np.unique(places)) == 2000
    # Mean of 2000 uniform draws: n/2 with standard deviation n / sqrt(12 * 2000); 5 sigma.
    assert abs(places.mean() / n - 0.5) < 5 / math.sqrt(12 * 2000)


@pytest.mark.parametrize("n", [2, 3, 4, 7, 16, 20])
def test_every_place_is_equally_likely(n: int) -> None:
    """Chi-square of where each index goes over many keys; independent of the code, from counts alone."""
    keys = 1500
    counts = np.zeros((n, n))
    for key in range(keys):
        counts[np.arange(n), Permutation(n, key).all()] += 1
    statistic = ((counts - keys / n) ** 2 / (keys / n)).sum()
    # Rows and columns of counts are fixed sums: (n - 1)^2 degrees of freedom; mean + 5 standard deviations.
    freedom = (n - 1) ** 2
    assert statistic < freedom + 5 * math.sqrt(2 * freedom) + 5


def test_neighbours_are_unrelated() -> None:
    permutation = Permutation(50_000, 9).all()
    correlation = np.corrcoef(permutation[:-1], permutation[1:])[0, 1]
    # Correlation of n independent pairs has standard deviation 1 / sqrt(n); 5 sigma.
    assert abs(correlation) < 5 / math.sqrt(50_000)


def test_programming_errors() -> None:
    with pytest.raises(ValueError, match="n >= 1"):
        Permutation(0, 1)
    with pytest.raises(IndexError):
        Permutation(5, 1)[5]
