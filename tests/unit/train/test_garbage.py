"""Cycles are collected at the steps named, and nowhere else."""

from __future__ import annotations

import gc
import weakref

import pytest

from nemotron3_megatron.train.garbage import COLLECT_EVERY_STEPS, collected_between_steps


class Node:
    """Refers to itself: only the collector can free it."""

    def __init__(self) -> None:
        self.itself = self


def test_cycles_wait_for_a_round_step() -> None:
    with collected_between_steps() as after_step:
        freed: list[bool] = []
        seen = weakref.ref(Node())
        for step in (COLLECT_EVERY_STEPS - 1, COLLECT_EVERY_STEPS):
            for _ in range(5000):  # beyond every threshold of the automatic collector
                Node()
            after_step(step)
            freed.append(seen() is None)
        assert freed == [False, True]


def test_the_collector_is_back_after_an_error() -> None:
    with pytest.raises(ValueError, match="step"):
        _fail_between_steps()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0


def _fail_between_steps() -> None:
    with collected_between_steps():
        assert not gc.isenabled()
        raise ValueError("step")
