"""Bytes that dispatcher, Mamba context parallelism and sequence parallelism really send, against the plan's."""

from __future__ import annotations

from typing import Any

import pytest
from launch import run_ranks
from tiny import GLOBAL_BATCH, SEQ_LENGTH
from traffic import traffic

HIDDEN, LATENT, TOP_K, MOE_LAYERS, FP32 = 32, 8, 2, 4, 4
"""Of ``tiny_run``: two MoE layers in the stack, and one block of MTP twice."""
TOKENS = GLOBAL_BATCH * SEQ_LENGTH // 2
"""Of a rank, which it sends to one other."""


@pytest.fixture(scope="module")
def measured() -> list[dict[str, Any]]:
    """What both ranks sent under each layout."""
    worlds = {
        "latent": {"ep": 2, "latent": LATENT},
        "standard": {"ep": 2, "latent": None},
        "gathered": {"ep": 2, "latent": LATENT, "dispatcher": "allgather"},
        "tensor": {"tp": 2, "stack": "MM*-", "mtp_depths": 0},
        "tensor and MTP": {"tp": 2, "stack": "M*"},
        "context": {"cp": 2, "stack": "MM*", "mtp_depths": 0},
    }
    results: list[dict[str, Any]] = run_ranks(traffic, 2, worlds=worlds)
    return results


@pytest.mark.parametrize(("world", "width"), [("latent", LATENT), ("standard", HIDDEN)])
def test_experts_exchange_what_the_plan_says_of_the_rows_really_routed(
    measured: list[dict[str, Any]], world: str, width: int
) -> None:
    """Each row goes out, comes back, and so do its gradients; its FP32 gate goes out and its gradient comes back."""
    ranks = [rank[world] for rank in measured]
    rows = sum(rank["rows_away"] for rank in ranks)
    tokens, gates = (sum(rank[key] for rank in ranks) for key in ("tokens", "gates"))
    assert rows > 0
    assert tokens == rows * 4 * width * FP32
    assert gates == rows * 2 * FP32
    planned = sum(rank["planned"]["all-to-all"] for rank in ranks)
    balanced = MOE_LAYERS * GLOBAL_BATCH * SEQ_LENGTH * TOP_K / 2  # half of all rows leave their rank
    assert tokens + gates == pytest.approx(planned * rows / balanced, rel=1e-12)


def test_latent_experts_exchange_hidden_over_latent_times_less(measured: list[dict[str, Any]]) -> None:
    per_row = {
        world: sum(rank[world]["tokens"] for rank in measured) / sum(rank[world]["rows_away"] for rank in measured)
        for world in ("latent", "standard")
    }
    assert per_row["standard"] / per_row["latent"] == HIDDEN / LATENT


def test_mamba_exchanges_sequence_for_heads_as_planned(measured: list[dict[str, Any]]) -> None:
    for rank in (each["context"] for each in measured):
        assert rank["tokens"] + rank["gates"] == rank["planned"]["all-to-all"]


def test_gathering_experts_exchange_what_the_plan_says(measured: list[dict[str, Any]]) -> None:
    """Whatever the routing: tokens once to the other rank, sums back, and gates of the other rank's experts."""
    for rank in (each["gathered"] for each in measured):
        assert rank["gathered"] == rank["planned"]["all-gather"] == 2 * MOE_LAYERS * LATENT * FP32 * TOKENS
        assert rank["scattered"] == rank["planned"]["reduce-scatter"]
        assert rank["tokens"] + rank["gates"] == rank["planned"]["all-to-all"]
        assert rank["held"] == [], "tokens of all ranks stay in memory behind the layer"


@pytest.mark.parametrize("world", ["tensor", "tensor and MTP"])
def test_linears_gather_and_scatter_the_sequence_as_planned(measured: list[dict[str, Any]], world: str) -> None:
    for rank in (each[world] for each in measured):
        assert rank["gathered"] == rank["planned"]["all-gather"]
        assert rank["scattered"] == rank["planned"]["reduce-scatter"]
