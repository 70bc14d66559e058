"""What is installed is what was planned, and works, or no rank starts."""

from __future__ import annotations

from launch import run_ranks
from precision_checks import trials, verification


def test_verification_stops_every_rank_with_the_same_table() -> None:
    first, second = run_ranks(verification, 2, pp=2)
    assert first["as planned"] == second["as planned"] == ""
    assert first["nothing installed"].startswith("29 modules do not follow the precision plan of 33")
    damaged = second["damaged"]
    assert damaged != first["damaged"]
    for messages in (first, second):
        assert messages["no rotation on rank 1"].startswith("1 module does not follow the precision plan of 33")
        assert damaged in messages["no rotation on rank 1"]
        assert "nvfp4 1x16 sr rht" in messages["no rotation on rank 1"]
        assert "decoder.layers.99.mixer.in_proj" in messages["planned and not built"]
        assert "not built" in messages["planned and not built"]
        assert "not in the plan" in messages["built and not planned"]


def test_self_test_finds_kernels_that_return_nonsense() -> None:
    for messages in run_ranks(trials, 2):
        assert messages["sound"] == ""
        assert "rank 1: nvfp4 dgrad is 100.0% from the exact product" in messages["zeros"]
        assert "rank 1: nvfp4 wgrad is nan% from the exact product" in messages["nan"]
        assert "rank 1: nvfp4 fprop is 0.0% from the exact product" in messages["not quantised"]
        assert "rank 0: nvfp4 dgrad: rounding should be stochastic, but two runs agree" in messages["not stochastic"]
        assert "fprop" not in messages["not stochastic"]
