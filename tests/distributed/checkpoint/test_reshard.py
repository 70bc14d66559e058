"""Checkpoints know no layout: what one saves, every other reads to the bit and continues alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks

# Layouts of two ranks, as options of job.tiny_run.
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "dp2 overlapped": {"overlap": True},
    "dp2 plain": {"distributed_optimizer": False},
    "ep2": {"ep": 2},
    "ep2 plain": {"ep": 2, "distributed_optimizer": False},
    "tp2": {"tp": 2},
    "tp2 ep2 plain": {"tp": 2, "ep": 2, "distributed_optimizer": False},
    "pp2": {"pp": 2},
    "pp2 interleaved": {"pp": 2, "vpp": 2, "stack": "M|E|*|E"},
    "cp2": {"cp": 2},
}


def between_layouts(folder: str) -> dict[str, Any]:
    """Train under DP2, then load, continue and save again under every other layout, and back."""
    from job import job, load_newest, same_bits, save, stored, train

    origin = Path(folder) / "origin"
    with job() as trainer:
        train(trainer, 0, 3)
        save(trainer, origin, 3)
        original = stored(origin, 3)
        expected = train(trainer, 3, 5)
    report: dict[str, Any] = {"expected": expected}
    for name, options in LAYOUTS.items():
        place = Path(folder) / name
        with job(**options) as trainer:
            load_newest(trainer, origin)
            save(trainer, place, 3)
            unchanged = same_bits(stored(place, 3), original)
            report[name] = {"unchanged": unchanged, "losses": train(trainer, 3, 5)}
    for name in ("ep2", "tp2", "pp2 interleaved", "dp2 plain"):
        with job() as trainer:
            load_newest(trainer, Path(folder) / name)
            report[name]["back"] = train(trainer, 3, 5) == expected
    return report


def on_one_rank(folder: str, names: list[str]) -> dict[str, Any]:
    """Continue two-rank checkpoints on one rank, by either kind of optimizer."""
    from job import job, load_newest, train

    report = {}
    for name in names:
        with job(distributed_optimizer=name != "pp2") as trainer:
            load_newest(trainer, Path(folder) / name)
            report[name] = train(trainer, 3, 5)
    return report


def test_every_layout_continues_the_same_run(tmp_path: Path) -> None:
    first, second = run_ranks(between_layouts, 2, folder=str(tmp_path))
    assert first == second
    expected = first.pop("expected")
    for name, found in first.items():
        assert found["unchanged"], name
        assert found.get("back", True), name
        _assert_alike(found["losses"], expected, name)

    names = ["ep2", "tp2", "pp2"]  # EP2 -> EP1, TP2 -> TP1, PP2 -> PP1 and DP2 -> DP1 with a smaller world
    (alone,) = run_ranks(on_one_rank, 1, folder=str(tmp_path), names=names)
    for name in names:
        _assert_alike(alone[name], expected, f"{name} on one rank")


def _assert_alike(losses: list[list[float]], expected: list[list[float]], name: str) -> None:
    """Losses (all depths) and gradient norm within float32 rounding.

    A loss of about 4 is a mean of 64 float32 values, each the result of sums over at most 64 terms: summing in
    another order moves it by at most 64 eps = 4e-6 relative; the gradient norm by the same per element and
    layer, 8 layers deep: 3e-5. A lost moment or a wrong step count moves the second step by more than 1e-3.
    """
    for step, wanted in zip(losses, expected, strict=True):
        assert step[:-1] == pytest.approx(wanted[:-1], rel=4e-6), name
        assert step[-1] == pytest.approx(wanted[-1], rel=3e-5), name
