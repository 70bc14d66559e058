"""Losses by tag are the same in every layout, add up to the whole loss, and are those of each tag's tokens alone.

Tolerance: means over at most 256 tokens of float32 losses near 4.2, whose terms the layouts add in another order and
compute with other roundings: one part in 2^-20, as in test_layouts.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
from launch import run_ranks
from tags import TAGS, measure, measure_alone

LOSS_TOLERANCE = 1e-6
WORLDS: dict[int, dict[str, dict[str, Any]]] = {
    2: {
        "dp2": {},
        "tp2_ep2": {"tp": 2, "ep": 2},
        "cp2": {"cp": 2},
        "pp2": {"pp": 2},
        "pp2_vpp2": {"pp": 2, "vpp": 2, "stack": "ME|M*|ME|-*"},
    },
    4: {"tp2_pp2_ep2": {"tp": 2, "pp": 2, "ep": 2}, "cp2_ep2_dp2": {"cp": 2, "ep": 2}},
}
LAYOUTS = ["one", *(name for worlds in WORLDS.values() for name in worlds)]


@pytest.fixture(scope="module")
def by_rank() -> dict[str, list[Any]]:
    """Results of each layout, one a rank; and ``alone``: loss by tag, computed without tags."""
    found: dict[str, list[Any]] = {name: [result] for name, result in run_ranks(measure_alone, 1)[0].items()}
    for nproc, worlds in WORLDS.items():
        ranks = run_ranks(measure, nproc, worlds=worlds)
        found |= {name: [rank[name] for rank in ranks] for name in worlds}
    return found


@pytest.mark.parametrize("what", ["validation", "training"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tags_in_every_layout(layout: str, what: str, by_rank: dict[str, list[Any]]) -> None:
    first, *others = (rank[what] for rank in by_rank[layout])
    assert all(other == first for other in others), "ranks disagree"
    tags = {name: (loss, tokens) for name, (loss, tokens) in first["tags"].items()}
    assert list(tags) == list(TAGS[:-1]), "a tag without a token that carries loss has no loss"
    counts = [tokens for _, tokens in by_rank["one"][0][what]["tags"].values()]
    assert [tokens for _, tokens in tags.values()] == counts
    assert {name: loss for name, (loss, _) in tags.items()} == pytest.approx(by_rank["alone"][0], rel=LOSS_TOLERANCE)
    whole = math.fsum(loss * tokens for loss, tokens in tags.values()) / sum(counts)
    assert first["losses"][0] == pytest.approx(whole, rel=LOSS_TOLERANCE)
