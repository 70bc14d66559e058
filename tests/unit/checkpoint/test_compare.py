"""The table that says why a checkpoint does not fit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.checkpoint import compare

SHAPES = st.dictionaries(st.sampled_from("abcdef"), st.tuples(st.integers(1, 3), st.integers(1, 3)))


@given(SHAPES, SHAPES)
def test_differences_are_exactly_what_differs(
    stored: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]
) -> None:
    rows = compare.differences(stored, wanted)
    assert [row[0] for row in rows] == sorted(k for k in {*stored, *wanted} if stored.get(k) != wanted.get(k))
    for key, left, right in rows:
        assert (left == "absent") == (key not in stored)
        assert (right == "absent") == (key not in wanted)


def test_optimizer_rows_only_when_weights_agree() -> None:
    moments = {f"optimizer.state.param.{i:02d}": (4,) for i in range(25)}
    assert len(compare.differences({**moments, "weight": (2,)}, {"weight": (2,)})) == 25
    assert compare.differences({**moments, "weight": (2, 3)}, {"weight": (2, 4)}) == [("weight", "2 x 3", "2 x 4")]


def test_table() -> None:
    rows = compare.differences({f"w{i:02d}": (2, 3) for i in range(25)} | {"a": ()}, {"w00": (2, 40)})
    lines = compare.table(rows).splitlines()
    assert lines[:3] == ["  tensor  checkpoint  model", "  a       scalar      absent", "  w00     2 x 3       2 x 40"]
    assert lines[-1] == "  ... and 6 more"
    assert len(lines) == 1 + 20 + 1
