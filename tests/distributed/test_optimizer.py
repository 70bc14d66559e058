"""The update: refused when any gradient of any rank is not finite, and exact where low precision would not be.

All checks run in one launch of two ranks (``e2e_optimizer.py``).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from e2e_optimizer import CHECKS, check_all
from launch import run_ranks

Results = list[dict[str, Any]]
REFUSED = [name for name, (check, _) in CHECKS.items() if check == "refused"]
TYPES = [name for name, (check, _) in CHECKS.items() if check == "types"]


@pytest.fixture(scope="module")
def results() -> Results:
    """What each rank saw."""
    return run_ranks(check_all, 2)


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_update_changes_nothing(name: str, results: Results) -> None:
    """The NaN is in one parameter of rank 1 only; no weight, moment, counter or expert bias moves on either rank."""
    for rank in results:
        seen = rank[name]
        assert not seen["applied"]
        assert not seen["finite_norm"]
        assert seen["finite_loss"]
        assert seen["changed"] == []
        assert seen["kinds"] == ["buffers", "optimizer", "steps", "weights"]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_update_names_the_parameter(name: str, results: Results) -> None:
    """On every rank by its global name: not rank 1's second expert but expert 5, not its first layer but layer 4."""
    for rank in results:
        (found,) = rank[name]["named"]
        assert found.startswith("decoder.layers.")
        assert found.endswith(rank[name]["broken"])


@pytest.mark.parametrize("name", REFUSED)
def test_training_goes_on_as_if_the_bad_step_had_not_been(name: str, results: Results) -> None:
    for rank in results:
        assert rank[name]["steps"] == rank[name]["undisturbed"]
        assert rank[name]["differs_at_end"] == []


@pytest.mark.parametrize("name", TYPES)
def test_types_of_a_bf16_run(name: str, results: Results) -> None:
    fp32, bf16 = "torch.float32", "torch.bfloat16"
    for rank in results:
        seen = rank[name]
        for parameter, dtype in seen["parameters"].items():
            kept = parameter.endswith(("mixer.A_log", "mixer.D", "mixer.dt_bias", "router.weight"))
            assert dtype == (fp32 if kept else bf16), parameter
        assert sum(dtype == fp32 for dtype in seen["parameters"].values()) == 3 * 3 + 3  # 3 Mamba layers, 3 routers
        routed = {n: d for n, d in seen["buffers"].items() if n.endswith(("expert_bias", "local_tokens_per_expert"))}
        assert len(routed) == 2 * 3
        assert set(routed.values()) == {fp32}
        assert seen["gradients"] == [fp32]
        assert seen["optimizer"] == [f"{kind} {fp32}" for kind in ("exp_avg", "exp_avg_sq", "param")]
        assert seen["adam"] == [fp32]


def test_expert_bias_follows_exact_counts(results: Results) -> None:
    """Counts above 256, where bfloat16 rounds (Megatron-LM pull requests 7081 and 1482): signs by integer counts."""
    would_differ = 0
    for rank in results:
        for router in rank["expert_bias"].values():
            counts = torch.tensor(router["counts"])
            assert counts.min() > 2 * 256
            signs = _signs(counts)
            # float32(0 + rate) is the rate itself.
            assert router["change"] == (signs * torch.tensor(1e-3)).tolist()
            assert router["left_over"] == 0
            would_differ += not torch.equal(signs, _signs(counts.bfloat16().long()))
    assert would_differ, "bfloat16 counts would have done as well: the test says nothing"


def test_weight_decay_is_for_matrices_only(results: Results) -> None:
    """From ones, with zero gradients and rate 0.5: factor 1 - 0.5 * 0.1 on matrices and convolutions, 1 elsewhere."""
    for rank in results:
        seen = rank["weight_decay"]
        assert seen["applied"]
        assert seen["grad_norm"] == 0
        assert seen["decay"] == 0.1
        vectors = [p for p in seen["parameters"].values() if p["ndim"] < 2]
        assert vectors
        assert len(vectors) < len(seen["parameters"])
        for name, parameter in seen["parameters"].items():
            wanted = 1.0 if parameter["ndim"] < 2 else 0.95
            # One float32 product.
            assert parameter["low"] == parameter["high"] == pytest.approx(wanted, abs=1e-7), name


def test_update_is_adamw_with_clipping_by_the_global_norm(results: Results) -> None:
    """Against float64. Each of 2 updates moves a weight by about the rate, 1e-3, with the relative error of the norm
    (3e4 squares summed in float32: sqrt(3e4) * 6e-8 = 1e-5) and of a dozen operations (12 * 6e-8); it rounds the
    weight itself, below 8 everywhere (dt_bias reaches -6.9), by 2^-24 of its size.
    """
    for rank in results:
        seen = rank["adamw"]
        for wanted, found in seen["norms"]:
            assert found == pytest.approx(wanted, rel=1e-5)
            assert wanted > 2 * seen["clip"], "nothing was clipped"
        assert seen["error"] < 2 * (1e-3 * 2e-5 + 8 * 2**-24), seen["worst"]


def _signs(counts: torch.Tensor) -> torch.Tensor:
    """Sign of mean - count, in integers."""
    return torch.sign(counts.sum() - len(counts) * counts)
