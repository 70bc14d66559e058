"""A stage's trainable parameters move, all others keep their values bit for bit, under every kind of optimizer."""

from __future__ import annotations

import re
from typing import Any

import pytest
from launch import run_ranks
from trainable_checks import CASES, check_all

LAYOUTS: dict[str, dict[str, Any]] = {
    "distributed": {"ep": 2, "dtype": "bf16"},
    "plain": {"pp": 2, "distributed_optimizer": False},
}


@pytest.fixture(scope="module", params=LAYOUTS)
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    return run_ranks(check_all, 2, options=LAYOUTS[request.param])


def test_only_trainable_parameters_move(ranks: list[dict[str, Any]]) -> None:
    for name in ("mtp", "experts", "router", "a bias"):
        moved = set()
        for rank in ranks:
            for parameter, changed in rank[name]["changed"].items():
                wanted = any(re.search(text, parameter) for text in CASES[name])
                assert not changed or wanted, f"{name}: {parameter}"
                moved |= {parameter} if changed else set()
        for text in CASES[name]:
            assert any(re.search(text, parameter) for parameter in moved), f"{name}: nothing with {text} moved"
    assert all(
        changed for rank in ranks for parameter, changed in rank["all"]["changed"].items() if "bias" not in parameter
    )


def test_frozen_gradients_count_in_no_norm(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert rank["a bias"]["grad_norm"] == 0
        assert 0 < rank["router"]["grad_norm"] < 0.9 * rank["all"]["grad_norm"]


def test_an_expression_that_finds_nothing_is_refused(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert "trainable=no_such_parameter" in rank["nothing"]
