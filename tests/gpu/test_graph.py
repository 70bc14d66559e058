"""A step that is replayed as a CUDA graph computes what it computes kernel by kernel.

Up to the order of atomic additions in the kernels (router, embedding): BF16 roundings flip now and then, as they do
between two runs without a graph. Bounds as in test_specs.py.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from captured import STEPS, compare
from launch import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]

BF16 = 2e-2
WORLDS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "without_attention": (1, {"isolate_documents": False, "stack": "MEM-", "mtp_depths": 0}),
    "router": (1, {"router_fusion": True}),
    "recompute": (1, {"recompute": "full"}),
    "recompute_parts": (1, {"recompute": "selective", "recompute_modules": ("moe", "core_attn")}),
    "dp2": (2, {}),
    "dp2_overlap": (2, {"overlap": True}),
    "ep2": (2, {"ep": 2, "dispatcher": "allgather"}),
    "ep2_overlap": (2, {"ep": 2, "dispatcher": "allgather", "overlap": True}),
    "ep2_recompute": (
        2,
        {"ep": 2, "dispatcher": "allgather", "overlap": True, "recompute": "selective", "recompute_modules": ("moe",)},
    ),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", WORLDS)
def test_graphs_change_nothing(world: str) -> None:
    """Losses, gradient norms, the last gradients of every parameter, validation between replays, and health."""
    ranks, options = WORLDS[world]
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    for found in run_ranks(compare, ranks, timeout_s=500, options=options):
        eager, graph = found["eager"], found["graph"]
        print(f"{world}: gradients {graph['gradients']:.1e}, of two runs without {found['again']['gradients']:.1e}")
        assert eager["captures"] == 0
        assert graph["captures"] >= 2, "with hooks and without"
        assert len(eager["losses"]) == STEPS + 1
        for expected, seen in zip(eager["losses"], graph["losses"], strict=True):
            assert seen == pytest.approx(expected, rel=3e-3)
        assert graph["gradients"] < BF16
        for expected, seen in zip(eager["health"], graph["health"], strict=True):
            assert seen.keys() == expected.keys()
            if seen:
                assert seen["residual_rms"] == pytest.approx(expected["residual_rms"], rel=BF16)
                assert seen["max_violation"] == pytest.approx(expected["max_violation"], abs=0.1)


@pytest.mark.timeout(600)
def test_a_step_that_lacked_room_is_computed_again() -> None:
    """Whatever room is foretold, experts need more: each replay is followed by a pass without a graph."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs 2 GPUs")
    options = {"ep": 2, "dispatcher": "allgather", "overlap": True}
    for found in run_ranks(compare, 2, timeout_s=500, options=options, room=1):
        eager, graph = found["eager"], found["graph"]
        print(f"gradients {graph['gradients']:.1e}; {graph['again']} steps computed again")
        assert graph["again"] > 0
        for expected, seen in zip(eager["losses"], graph["losses"], strict=True):
            assert seen == pytest.approx(expected, rel=3e-3)
        assert graph["gradients"] < BF16
