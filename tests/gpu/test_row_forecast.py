"""Experts that are launched before the CPU knows their rows compute what they compute after a wait, bit for bit.

But for what mamba-ssm adds up atomically, in any order: the gradients of ``dt_bias`` and ``A_log``.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch
from forecast import measure_rooms
from launch import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(400),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_spare_rows_change_nothing(recompute: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for found in run_ranks(measure_rooms, 2, timeout_s=300, recompute=recompute):
        print({room: (each["differ"], each["calls"]) for room, each in found.items()})
        assert found["foreseen"]["calls"] == found["waiting"]["calls"], "every first try had room"
        assert found["too small"]["calls"] == 2 * found["waiting"]["calls"]
        for each in found.values():
            assert each["losses"] == found["waiting"]["losses"]
            assert [name for name in each["differ"] if not name.endswith(("dt_bias", "A_log"))] == []
