"""Planned activations of the torch spec against the allocator, in real passes of small models on CPU."""

from __future__ import annotations

from typing import Any

import pytest
from activation_checks import measured
from launch import run_ranks

from nemotron3_megatron.model import attention
from nemotron3_megatron.plan import activations_torch

STACK = "MEM*E-"
PLAIN: dict[str, Any] = {"stack": STACK, "dtype": "bf16", "mtp_depths": 0}


def _alone(symbol: str, dtype: str, **more: Any) -> dict[str, Any]:
    """A stack of one layer and so few logits that the peak is the layer's."""
    return {"stack": symbol, "dtype": dtype, "mtp_depths": 0, "vocabulary": 32, **more}


ONE_RANK: list[dict[str, Any]] = [
    *(_alone(symbol, dtype) for symbol in "M*E-" for dtype in ("fp32", "bf16")),
    _alone("M", "bf16", rows=2),
    _alone("*", "bf16", isolate_documents=False),
    _alone("*", "bf16", length=6144),  # scores of 4 heads fill 576 MiB: queries go in blocks
    _alone("E", "bf16", latent=None),
    {"stack": STACK, "dtype": "bf16"},
    {"stack": STACK, "dtype": "fp32", "rows": 2, "mtp_depths": 1},
    PLAIN | {"recompute": "full"},
    {"stack": STACK, "dtype": "bf16", "recompute": "full"},
    *(
        PLAIN | {"recompute": "selective", "recompute_modules": [module]}
        for module in ("core_attn", "mlp", "moe", "shared_experts")
    ),
]
TWO_RANKS: list[dict[str, Any]] = [
    {"stack": STACK, "dtype": dtype, layout: 2} for layout in ("tp", "ep", "cp") for dtype in ("fp32", "bf16")
]
PIPELINES: list[dict[str, Any]] = [
    {"stack": "MEM|*E-", "dtype": "bf16", "pp": 2, "micro_batches": 4},
    {"stack": "MEM|*E-", "dtype": "fp32", "pp": 2, "micro_batches": 4, "mtp_depths": 0},
]


@pytest.fixture(scope="module")
def one_rank() -> list[Any]:
    return run_ranks(measured, 1, worlds=ONE_RANK)


@pytest.fixture(scope="module")
def two_ranks() -> list[Any]:
    return run_ranks(measured, 2, worlds=[*TWO_RANKS, *PIPELINES])


def _compare(found: dict[str, int], *, kept: float = 0.02, peak: float = 0.1) -> None:
    """Kept within 2 %: constants of a few KiB (norms' widened weights, which a plan of millions of tokens leaves out)
    are up to 1 % of these sizes, and routing of fresh weights is not even. Peaks within 10 %: backward passes are
    planned by their largest tensors (most are within 1 %)."""
    assert found["planned_kept"] == pytest.approx(found["kept"], rel=kept)
    assert found["planned_peak"] == pytest.approx(found["peak"], rel=peak)


def test_plan_knows_when_queries_go_in_blocks() -> None:
    assert activations_torch.SCORE_BYTES == attention.SCORE_BYTES


@pytest.mark.parametrize("world", range(len(ONE_RANK)), ids=lambda world: str(ONE_RANK[world]))
def test_one_rank(one_rank: list[Any], world: int) -> None:
    # A recomputed layer keeps the state of two random generators, 10 KiB; its input here has 32 KiB.
    remade = ONE_RANK[world].get("recompute") == "full"
    _compare(one_rank[0][world], kept=0.1 if remade else 0.02)


@pytest.mark.parametrize("world", range(len(TWO_RANKS)), ids=lambda world: str(TWO_RANKS[world]))
def test_tensor_expert_and_context_parallel_ranks(two_ranks: list[Any], world: int) -> None:
    # gloo's threads hold some of what they sent a little longer: on a busy machine up to 2 % more are measured.
    for rank in two_ranks:
        _compare(rank[world], kept=0.05)


@pytest.mark.parametrize("world", range(len(PIPELINES)), ids=lambda world: str(PIPELINES[world]))
def test_pipeline_ranks_hold_the_micro_batches_in_flight(two_ranks: list[Any], world: int) -> None:
    """By the real schedule. 10 %: it also holds the tensors that stages send each other."""
    for rank in two_ranks:
        found = rank[len(TWO_RANKS) + world]
        assert found["planned_peak"] == pytest.approx(found["peak"], rel=0.1)
