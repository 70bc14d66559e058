"""Planned weights, gradients and optimizer state equal the real tensors of real ranks byte for byte."""

from __future__ import annotations

from typing import Any

import pytest
from launch import run_ranks
from memory_checks import held
from tiny import tiny_run

from nemotron3_megatron.plan.buffers import buffers, optimizer_bytes, weight_bytes
from nemotron3_megatron.plan.memory import memory_plan
from nemotron3_megatron.plan.parameters import chunk_parameters, chunks, router_buffer_bytes

WORLDS: list[dict[str, Any]] = [
    {"dtype": "bf16"},
    {"dtype": "bf16", "distributed_optimizer": False},
    {"dtype": "fp32", "ep": 2},
    {"dtype": "bf16", "ep": 2, "latent": None, "mtp_depths": 0, "overlap": True},
    {"dtype": "bf16", "tp": 2},
    {"dtype": "bf16", "tp": 2, "distributed_optimizer": False},
    {"dtype": "bf16", "pp": 2, "repeated_mtp": False},
    {"dtype": "fp32", "pp": 2, "vpp": 2, "stack": "ME|M*|ME|-*"},
    {"dtype": "bf16", "cp": 2},
]
"""Two ranks each: data, expert, tensor, pipeline (interleaved, too) and context parallel."""


@pytest.fixture(scope="module")
def ranks() -> list[Any]:
    return run_ranks(held, 2, worlds=WORLDS)


@pytest.mark.parametrize("world", range(len(WORLDS)))
def test_weights_gradients_and_optimizer_equal_real_tensors(ranks: list[Any], world: int) -> None:
    run = tiny_run(2, **WORLDS[world])
    plan = memory_plan(run)
    for rank in ranks:
        real = rank[world]
        memory = plan.ranks[real["pp"]]
        assert (memory.weights, memory.gradients) == (real["weights"], real["gradients"])
        mine = chunks(run, real["pp"])
        held_here = [b for chunk in mine for b in buffers(run, chunk_parameters(run, chunk), real["pp"])]
        assert memory.weights == sum(weight_bytes(run, b) for b in held_here) + sum(
            router_buffer_bytes(run, chunk) for chunk in mine
        )
        state = [optimizer_bytes(run, b)[real["expert" if b.expert else "dense"]] for b in held_here]
        assert sum(state) == real["optimizer"]
    fullest = [max(r[world]["optimizer"] for r in ranks if r[world]["pp"] == pp) for pp in range(run.layout.pp)]
    assert [memory.optimizer for memory in plan.ranks] == fullest
