"""Random layouts, one after the other: each reads what the one before wrote, to the bit, and takes the same step."""

from __future__ import annotations

import random
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from launch import run_ranks

SEED = 12
CHAINS = ((4, 6), (2, 2))
"""(ranks, layouts): five pairs between 4 ranks, one from 4 to 2, one between 2. Another SEED has others."""

STACKS = {1: "ME*E", 2: "ME|*E", 4: "M|E|*|E"}
"""Cut into so many pipeline chunks."""


def layouts(ranks: int) -> list[dict[str, Any]]:
    """Every legal layout of the test model on so many ranks."""
    found = []
    for tp, pp, vpp, cp, ep, etp in product((1, 2), (1, 2, 4), (1, 2), (1, 2), (1, 2, 4), (1, 2)):
        fits = ranks % (tp * pp * cp) == 0 and ranks % (pp * ep * etp) == 0
        if fits and (vpp == 1 or pp == 2):
            sizes = {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep, "etp": etp}
            found += [{**sizes, "distributed_optimizer": kind, "stack": STACKS[pp * vpp]} for kind in (True, False)]
    return found


pytestmark = pytest.mark.timeout(900)


def chain(folder: str, first: str | None, steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Through all layouts of ``steps``; ``first`` is read by the first of them, or made by it."""
    from job import job, load_newest, moved_biases, same_bits, save, stored, train

    root = Path(folder)
    before = None if first is None else root / first
    report: dict[str, Any] = {"losses": [], "unchanged": [], "biases": []}
    for number, options in enumerate(steps):
        place = root / f"{len(steps)}_{number}"
        with job(**options) as trainer:
            if before is None:
                train(trainer, 0, 2)
            else:
                assert load_newest(trainer, before)["data"] == {"drawn": 7}
            save(trainer, place, 2, data={"drawn": 7})
            report["unchanged"].append(before is None or same_bits(stored(place, 2), stored(before, 2)))
            report["biases"].append(moved_biases(stored(place, 2)))
            # Training with expert tensor parallelism gathers unequal parts, which gloo cannot: bits only.
            report["losses"].append(train(trainer, 2, 3)[0] if options["etp"] == 1 else None)
        before = place
    return report


def test_random_layouts(tmp_path: Path) -> None:
    chosen = random.Random(SEED)
    reports, first = [], None
    for ranks, count in CHAINS:
        steps = chosen.sample(layouts(ranks), count)
        for report in run_ranks(chain, ranks, timeout_s=600, folder=str(tmp_path), first=first, steps=steps):
            reports.append((steps, report))
        first = f"{len(steps)}_{len(steps) - 1}"
    expected = reports[0][1]["losses"][0]
    assert expected is not None, "the first layout must be one that can train here"
    for steps, report in reports:
        for options, unchanged, biases, losses in zip(
            steps, report["unchanged"], report["biases"], report["losses"], strict=True
        ):
            assert unchanged, options
            assert biases > 0, "the experts' biases had moved"
            if losses is None:
                continue
            # Rounding of float32 sums in another order: see test_reshard._assert_alike.
            assert losses[:-1] == pytest.approx(expected[:-1], rel=4e-6), options
            assert losses[-1] == pytest.approx(expected[-1], rel=3e-5), options


def between_dtypes(folder: str) -> dict[str, bool]:
    """BF16 to FP32 and back, under each kind of optimizer: the masters decide."""
    import torch
    from job import job, load_newest, save, stored, train

    report = {}
    for before, after in (("bf16", "fp32"), ("fp32", "bf16")):
        for kind in (True, False):
            place = Path(folder) / f"{before}{kind}"
            with job(dtype=before, distributed_optimizer=kind) as trainer:
                train(trainer, 0, 1)
                save(trainer, place, 1)
            with job(dtype=after, distributed_optimizer=not kind) as trainer:
                load_newest(trainer, place)
                save(trainer, place, 2)
            old, new = stored(place, 1), stored(place, 2)
            masters = [key for key in old if key.startswith("optimizer.")]
            weights = [key.removeprefix("optimizer.state.param.") for key in masters if ".param." in key]
            report[f"{before} to {after}, masters"] = all(torch.equal(old[key], new[key]) for key in masters)
            report[f"{before} to {after}, weights"] = all(
                torch.equal(new[key], old[f"optimizer.state.param.{key}"].to(new[key].dtype)) for key in weights
            )
            wanted = {"bf16": torch.bfloat16, "fp32": torch.float32}[after]
            report[f"{before} to {after}, dtype"] = new["embedding.word_embeddings.weight"].dtype == wanted
    return report


def test_another_dtype(tmp_path: Path) -> None:
    for report in run_ranks(between_dtypes, 2, folder=str(tmp_path)):
        assert len(report) == 6
        assert all(report.values()), report
