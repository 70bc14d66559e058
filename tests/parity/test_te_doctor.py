"""The doctor's checks of linears and experts through Transformer Engine's own Python, as in test_te_lowering.

TRANSFORMER_ENGINE_SOURCES=FOLDER python -m pytest tests/parity/test_te_doctor.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]

import te_doctor
from launch import run_ranks

FOLDER = "TRANSFORMER_ENGINE_SOURCES"
pytestmark = pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} is not set")


def test_every_comparison_is_within_its_bound() -> None:
    (found,) = run_ranks(te_doctor.verdicts, 1)
    assert {what for what, _, _ in found["norm + linear"]} == {"y", "dx", "dweight", "dscale"}
    for comparisons in found.values():
        assert all(error <= bound for _, error, bound in comparisons)
    errors = {name: {what: error for what, error, _ in comparisons} for name, comparisons in found.items()}
    assert errors["column linear"]["dweight"] < 1e-6 < errors["row linear"]["dweight"], "added in float32, and rounded"
