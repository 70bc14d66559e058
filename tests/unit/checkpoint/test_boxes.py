"""Flat ranges as boxes: exactly those elements, each contiguous in memory."""

from __future__ import annotations

from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.ssm.utils import _split_tensor_factory

from nemotron3_megatron.checkpoint.boxes import boxes, pieces, sharded

SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_boxes_are_the_range(shape: tuple[int, ...], data: st.DataObject) -> None:
    begin = data.draw(st.integers(0, prod(shape)))
    end = data.draw(st.integers(begin, prod(shape)))
    numbers = torch.arange(prod(shape)).view(shape)
    found = list(boxes(shape, begin, end))
    cut = [numbers[tuple(slice(a, a + n) for a, n in zip(*box, strict=True))] for box in found]
    assert torch.cat([part.reshape(-1) for part in [torch.empty(0, dtype=torch.int64), *cut]]).tolist() == [
        *range(begin, end)
    ]
    assert len(found) <= 2 * len(shape) - 1


@given(st.data())
def test_shards_of_a_joint_projection_fill_the_whole_tensors(data: st.DataObject) -> None:
    """Two tensor-parallel ranks' halves of [x | y], each divided among data-parallel ranks, put together again."""
    widths = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    columns, ranks = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    whole = {name: torch.full((2 * n, columns), -1) for name, n in zip("xy", widths, strict=True)}
    expected = {name: torch.arange(2 * n * columns).view(2 * n, columns) for name, n in zip("xy", widths, strict=True)}
    for tp in range(2):
        local = torch.cat([expected[name].chunk(2)[tp] for name in "xy"])
        entry = _split_tensor_factory(
            ShardedTensor.from_rank_offsets("w", local, (0, tp, 2), replica_id=(0, 0, 1)), list(widths), ["x", "y"], 0
        )
        cuts = sorted(data.draw(st.integers(0, local.numel())) for _ in range(ranks - 1))
        for begin, end in zip([0, *cuts], [*cuts, local.numel()], strict=True):
            for item in sharded(pieces(entry), "moment", begin, local.reshape(-1)[begin:end].clone(), alone=True):
                assert item.replica_id == (0, 0, 0)
                corner = tuple(slice(a, a + n) for a, n in zip(item.global_offset, item.local_shape, strict=True))
                target = whole[item.key.removeprefix("moment.w.")]
                assert (target[corner] == -1).all()
                target[corner] = item.data
    for name, tensor in whole.items():
        assert torch.equal(tensor, expected[name])


def test_loading_into_a_shard_fills_the_parameter_s_memory() -> None:
    flat = torch.zeros(7)
    entry = ShardedTensor.from_rank_offsets("w", torch.empty(4, 3), (0, 1, 2), replica_id=(0, 0, 0))
    for item in sharded(pieces(entry), "p", 2, flat, alone=False):
        item.data.fill_(1)
    assert flat.tolist() == [1.0] * 7


def test_an_expert_s_number_is_an_axis_of_the_whole_tensor() -> None:
    entry = ShardedTensor.from_rank_offsets("w", torch.empty(2, 3), (0, 5, 8), prepend_axis_num=1, replica_id=(0, 0, 3))
    (item,) = sharded(pieces(entry), "p", 0, torch.zeros(6), alone=False)
    assert (item.global_shape, item.global_offset, item.local_shape) == ((8, 2, 3), (5, 0, 0), (1, 2, 3))
    assert item.replica_id == (0, 0, 3)


def test_a_factory_that_reorders_is_refused() -> None:
    def build(key: str, tensor: torch.Tensor, replica_id: object, _: object) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(f"{key}.{i}", t, replica_id=replica_id) for i, t in enumerate(tensor.T)]

    entry = ShardedTensorFactory("w", torch.empty(2, 3), build, None, (0, 0, 0))
    with pytest.raises(TypeError, match="do not follow one another"):
        pieces(entry)
