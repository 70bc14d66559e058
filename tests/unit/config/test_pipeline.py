from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config import compose
from nemotron3_megatron.config.pipeline import cut_pattern, hybrid_layer_pattern


def largest(pieces: list[str], costs: list[int], tail: int) -> int:
    start, sums = 0, []
    for piece in pieces:
        sums.append(sum(costs[start : start + len(piece)]))
        start += len(piece)
    sums[-1] += tail
    return max(sums)


def every_cut(pattern: str, segments: int) -> list[list[str]]:
    cuts = combinations(range(1, len(pattern)), segments - 1)
    return [[pattern[a:b] for a, b in zip((0, *cut), (*cut, len(pattern)), strict=True)] for cut in cuts]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 9), st.integers(0, 100))
def test_no_cut_has_a_smaller_largest_segment(costs: list[int], segments: int, tail: int) -> None:
    pattern = "M" * len(costs)
    if segments > len(costs):
        with pytest.raises(ValueError, match="cannot cut"):
            cut_pattern(pattern, segments, costs, tail=tail)
        return
    pieces = cut_pattern(pattern, segments, costs, tail=tail).split("|")
    assert len(pieces) == segments
    assert all(pieces)
    assert "".join(pieces) == pattern
    assert largest(pieces, costs, tail) == min(largest(cut, costs, tail) for cut in every_cut(pattern, segments))


def test_equal_layers_are_cut_evenly() -> None:
    assert cut_pattern("MMMMMMMM", 4, [1] * 8) == "MM|MM|MM|MM"


def test_the_last_segment_makes_room_for_the_output_layer_and_mtp() -> None:
    model = compose(["recipe=super_bf16"])[0].model
    main, *depths = hybrid_layer_pattern(model, 4, 8192).split("/")
    lengths = [len(segment) for segment in main.split("|")]
    assert depths == ["*E", "*E"]
    assert sum(lengths) == 88
    assert lengths[-1] < min(lengths[:-1])
