"""Micro-batches against a token-by-token reference, and their context-parallel shards."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch

EOD = 0


def reference(window: list[int], depths: int, isolate: bool) -> dict[str, list]:
    """What the contract says, one token at a time."""
    length = len(window) - 1
    document_of, position_of, document, position = [], [], 0, 0
    for token in window:
        document_of.append(document)
        position_of.append(position)
        position += 1
        if isolate and token == EOD:
            document, position = document + 1, 0
    labels, masks = [], []
    for depth in range(depths + 1):
        row, mask = [], []
        for i in range(length):
            target = i + 1 + depth
            exists = target <= length
            row.append(window[target] if exists else 0)
            mask.append(1.0 if exists and document_of[target] == document_of[i] else 0.0)
        labels.append(row)
        masks.append(mask)
    return {
        "tokens": window[:-1],
        "labels": labels,
        "loss_mask": masks,
        "position_ids": position_of[:-1],
        "documents": document_of[:-1],
    }


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(2, 24).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 4), min_size=n, max_size=n), min_size=1, max_size=3)
    ),
    depths=st.integers(0, 3),
    isolate=st.booleans(),
)
def test_matches_token_by_token_reference(rows: list[list[int]], depths: int, isolate: bool) -> None:
    batch = build_micro_batch(torch.tensor(rows), mtp_depths=depths, eod_token=EOD, isolate_documents=isolate)
    for b, window in enumerate(rows):
        expected = reference(window, depths, isolate)
        assert batch.tokens[b].tolist() == expected["tokens"]
        assert batch.labels[:, b].tolist() == expected["labels"]
        assert batch.loss_mask[:, b].tolist() == expected["loss_mask"]
        assert batch.position_ids[b].tolist() == expected["position_ids"]
        assert batch.documents[b].tolist() == expected["documents"]


def test_shapes_and_dtypes() -> None:
    batch = build_micro_batch(torch.ones(3, 9, dtype=torch.int64), mtp_depths=2, eod_token=0, isolate_documents=True)
    assert batch.tokens.shape == batch.position_ids.shape == batch.documents.shape == (3, 8)
    assert batch.labels.shape == batch.loss_mask.shape == (3, 3, 8)
    assert (batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype) == (torch.int64,) * 3
    assert (batch.loss_mask.dtype, batch.documents.dtype) == (torch.float32, torch.int32)


def test_loss_crosses_no_boundary_but_predicts_the_eod() -> None:
    window = torch.tensor([[5, 6, EOD, 7, 8]])
    batch = build_micro_batch(window, mtp_depths=1, eod_token=EOD, isolate_documents=True)
    assert batch.loss_mask[0, 0].tolist() == [1, 1, 0, 1]
    assert batch.loss_mask[1, 0].tolist() == [1, 0, 0, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 0]


def join(parts: list[torch.Tensor]) -> torch.Tensor:
    """Undo the zig-zag: rank r holds chunks r and 2n - 1 - r."""
    size = len(parts)
    chunks: list[torch.Tensor | None] = [None] * (2 * size)
    for rank, part in enumerate(parts):
        chunks[rank], chunks[2 * size - 1 - rank] = part.chunk(2, dim=-1)
    return torch.cat([chunk for chunk in chunks if chunk is not None], dim=-1)


@pytest.mark.parametrize("cp_size", [1, 2, 4])
def test_shards_reassemble(cp_size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    windows = torch.randint(0, 5, (2, 33), generator=generator)
    tags = torch.tensor([[True, False], [False, True]])
    whole = replace(build_micro_batch(windows, mtp_depths=2, eod_token=EOD, isolate_documents=True), tags=tags)
    shards = [whole.shard(rank, cp_size) for rank in range(cp_size)]
    assert all(torch.equal(shard.tags, tags) for shard in shards), "tags are of whole sequences"
    for name in set(MicroBatch.__slots__) - {"tags"}:
        parts = [getattr(shard, name) for shard in shards]
        assert all(part.shape[-1] == 32 // cp_size for part in parts)
        if cp_size > 1:
            assert torch.equal(join(parts), getattr(whole, name))


@pytest.mark.parametrize("cp_rank", [0, 1, 2])
def test_shard_layout_is_megatrons(cp_rank: int) -> None:
    """Against Megatron-Core's own slicing, on torch's fake process group (it only asks for rank and size)."""
    from megatron.core.utils import get_batch_on_this_cp_rank
    from torch.testing._internal.distributed.fake_pg import FakeStore

    tokens = torch.arange(2 * 25).reshape(2, 25)
    batch = build_micro_batch(tokens, mtp_depths=0, eod_token=-1, isolate_documents=False)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=cp_rank, world_size=3)
    try:
        theirs = get_batch_on_this_cp_rank({"tokens": batch.tokens}, False, cp_group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()
    assert torch.equal(batch.shard(cp_rank, 3).tokens, theirs["tokens"])


def test_programming_errors() -> None:
    batch = build_micro_batch(torch.ones(1, 7, dtype=torch.int64), mtp_depths=0, eod_token=0, isolate_documents=True)
    with pytest.raises(ValueError, match="multiple of 2"):
        batch.shard(0, 2)
    with pytest.raises(ValueError, match="cp_rank"):
        batch.shard(2, 2)
    with pytest.raises(ValueError, match="windows"):
        build_micro_batch(torch.ones(4, dtype=torch.int64), mtp_depths=0, eod_token=0, isolate_documents=True)
