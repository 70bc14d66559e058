"""The exchange between ranks, over gloo."""

from __future__ import annotations

from dataclasses import replace

from nemotron3_megatron.platform.checks.collectives import NAMES, exchange_between


def test_two_ranks_exchange_rightly_and_too_slowly_for_the_peak_asked_for() -> None:
    outcome = exchange_between(2, "gloo", 2**12, peak=1e18)
    assert tuple(each.what for each in outcome.comparisons) == NAMES
    assert tuple(each.what for each in outcome.measurements) == NAMES
    assert all(each.passed for each in outcome.comparisons)
    assert all(0 < each.value < 1e12 for each in outcome.measurements)
    assert not outcome.passed
    assert replace(outcome, measurements=()).passed
