"""Which ranks are slow."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron3_megatron.platform import select
from nemotron3_megatron.train.callbacks.kernel_times import Kernels
from nemotron3_megatron.train.callbacks.stragglers import RankTimes, percentiles, probe_seconds, slow_ranks, summary

USUAL = RankTimes("node1", 1.0, 1.1, 0.002, 0.010)


@pytest.mark.parametrize(
    ("seconds", "found"),
    [([2.0], (2.0, 2.0)), ([3.0, 1.0, 2.0], (2.0, 3.0)), ([float(n) for n in range(1, 101)], (50.5, 95.0))],
)
def test_percentiles(seconds: list[float], found: tuple[float, float]) -> None:
    assert percentiles(seconds) == found


def test_nobody_is_slow() -> None:
    assert slow_ranks([USUAL] * 4, 1.5) == []
    late = replace(USUAL, gap_p50=0.009, step_p50=0.05)
    assert slow_ranks([USUAL] * 3 + [late], 1.5) == [], "a few milliseconds matter to nobody"


def test_slow_ranks_worst_first() -> None:
    late, slow = replace(USUAL, gap_p50=0.5, host="node2"), replace(USUAL, probe=0.021, host="node3")
    found = slow_ranks([USUAL, slow, USUAL, late, USUAL], 1.5)
    assert found == [
        "rank 3 on node2 starts its steps 0.498 s late",
        "rank 1 on node3 computes 2.1 times slower than the median rank",
    ]


def test_kernels_tell_slow_from_become_slow() -> None:
    """A rank whose kernels nobody measures is not judged by them."""
    usual = replace(USUAL, kernels=Kernels(busy=40.0, slower=1.1))
    slow = replace(usual, kernels=Kernels(busy=100.0, slower=1.0))
    slower = replace(usual, kernels=Kernels(busy=42.0, slower=1.8))
    assert slow_ranks([usual, usual, slow, USUAL, slower], 1.5) == [
        "rank 2 on node1 is busy with kernels 2.4 times as long as the median rank",
        "rank 4 on node1 takes 1.8 times as long for its kernels as it once did",
    ]


def test_summary_gives_ranges() -> None:
    text = summary(100, [USUAL, replace(USUAL, step_p50=2.0)])
    assert text.startswith("step 100, 2 ranks: step p50 1.000-2.000 s, p95 1.100-1.100 s")


def test_the_probe_takes_time() -> None:
    assert 0 < probe_seconds(select("cpu")) < 10
