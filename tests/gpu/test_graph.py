"""A step that is replayed as a CUDA graph computes what it computes kernel by kernel."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from captured import STEPS, losses
from launch import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("isolate_documents", [True, False])
def test_graphs_change_nothing(isolate_documents: bool) -> None:
    """Up to the order of atomic additions in the kernels (router, embedding): BF16 roundings flip now and then."""
    (found,) = run_ranks(losses, 1, timeout_s=500, isolate_documents=isolate_documents)
    assert found["none captures"] == 0
    assert found["passes captures"] >= 1
    assert len(found["none"]) == STEPS + 1
    for eager, graphed in zip(found["none"], found["passes"], strict=True):
        assert graphed == pytest.approx(eager, rel=3e-3)
