"""Transformer Engine's kernels over prepared lists update as Megatron-Core's optimizer with the same kernels does."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from launch import run_ranks
from updates_checks import compare

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]

WORLDS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bf16", "device": "cuda", "spec": "torch"},
    "fp32": {"device": "cuda", "spec": "torch"},
}


def test_same_training() -> None:
    """The first step's masters differ by rounding only; see tests/distributed/test_updates.py for the rest."""
    results: dict[str, Any] = run_ranks(compare, 1, timeout_s=300, worlds=WORLDS, ours="transformer_engine")[0]
    for seen in results.values():
        assert seen["norms"][0][0] == pytest.approx(seen["norms"][1][0], rel=1e-6)
        assert seen["norms"][0] == pytest.approx(seen["norms"][1], rel=2**-8)
        assert seen["losses"][0] == pytest.approx(seen["losses"][1], rel=2**-8)
        assert seen["masters"] < 1e-2
        assert seen["weights"] < 1e-2
