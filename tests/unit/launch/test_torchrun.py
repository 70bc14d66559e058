"""Starts without torchrun, and with another world than was asked for."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config import UserError, compose
from nemotron3_megatron.launch.torchrun import world_made

MADE = {"WORLD_SIZE": "4"}


def test_the_world_is_torchrun_s() -> None:
    for overrides in (["recipe=tiny"], ["recipe=tiny", "world_size=4"]):  # tiny's own is of 2, for planning
        assert world_made(*compose(overrides), overrides, MADE) == 4


def test_another_world_than_asked_for_is_refused() -> None:
    overrides = ["recipe=tiny", "world_size=8"]
    with pytest.raises(UserError, match=r"4 processes were started.*\n  nearest legal: torchrun --nproc-per-node=8"):
        world_made(*compose(overrides), overrides, MADE)


def test_a_start_without_torchrun_is_answered_with_the_command() -> None:
    overrides = ["recipe=tiny", 'run_dir="a b"']
    with pytest.raises(UserError, match="not started by torchrun") as caught:
        world_made(*compose(overrides), overrides, {})
    assert caught.value.nearest == """torchrun --nproc-per-node=2 train.py recipe=tiny 'run_dir="a b"'"""
