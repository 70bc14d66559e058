"""Attention of a context-parallel rank to the whole sequence, in blocks and in segments, against dense masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nemotron3_megatron.model.attention import attention_in_blocks, zigzag_slices
from nemotron3_megatron.model.documents import document_starts
from nemotron3_megatron.model.segments import FEWEST_SEGMENTS, segment_attention, segments

LENGTH, BATCH, HEADS, GROUPS, WIDTH = 48, 2, 4, 2, 8
ROUNDING = 1e-12
"""float64: sums of at most 48 weights times 8 products, each near 1, 400 * 2^-53 = 4e-14, in a chain of three."""

LAYOUTS = [(rank, cp) for cp in (1, 2, 4) for rank in range(cp)]


def _documents(kind: str) -> Tensor:
    """Index of each position's document in two sequences (B, G)."""
    if kind == "one":
        return torch.zeros(BATCH, LENGTH, dtype=torch.int32)
    if kind == "each token":
        return torch.arange(LENGTH, dtype=torch.int32).repeat(BATCH, 1)
    generator = torch.Generator().manual_seed(5)
    return (torch.rand(BATCH, LENGTH, generator=generator) < 0.15).cumsum(1).to(torch.int32)


def _inputs(cp: int) -> list[Tensor]:
    """Queries of a rank (S, B, N, D), keys and values of the whole sequence (G, B, K, D)."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(LENGTH // cp, BATCH, HEADS, WIDTH), *[(LENGTH, BATCH, GROUPS, WIDTH)] * 2]
    return [torch.randn(s, generator=generator, dtype=torch.float64, requires_grad=True) for s in shapes]


def _dense(query: Tensor, key: Tensor, value: Tensor, documents: Tensor, positions: list[int]) -> Tensor:
    """Softmax over an explicit matrix of scores, position by position."""
    rows = []
    for index, position in enumerate(positions):
        scores = torch.einsum("bnd,gbnd->bng", query[index], key.repeat_interleave(HEADS // GROUPS, 2)) * WIDTH**-0.5
        seen = (torch.arange(LENGTH) <= position) & (documents == documents[:, position, None])
        weights = scores.masked_fill(~seen[:, None], -torch.inf).softmax(-1)
        rows.append(torch.einsum("bng,gbnd->bnd", weights, value.repeat_interleave(HEADS // GROUPS, 2)).flatten(1))
    return torch.stack(rows)


def _variable_length(
    query: Tensor, key: Tensor, value: Tensor, query_ends: Tensor, key_ends: Tensor, _widest: int, _longest: int
) -> Tensor:
    """A kernel for sequences of different lengths by its definition: the last query of each sees all of its keys."""
    out = []
    for n in range(len(query_ends) - 1):
        q = query[query_ends[n] : query_ends[n + 1]]
        k, v = (each[key_ends[n] : key_ends[n + 1]].repeat_interleave(HEADS // GROUPS, 1) for each in (key, value))
        scores = torch.einsum("qnd,knd->nqk", q, k) * WIDTH**-0.5
        seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
        out.append(torch.einsum("nqk,knd->qnd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1))
    return torch.cat(out)


def _agree(compute: Callable[[Tensor, Tensor, Tensor], Tensor], documents: Tensor, rank: int, cp: int) -> None:
    inputs = _inputs(cp)
    positions = [p for first, end in zigzag_slices(LENGTH, rank, cp) for p in range(first, end)]
    found, expected = compute(*inputs), _dense(*inputs, documents, positions)
    torch.testing.assert_close(found, expected, rtol=0, atol=ROUNDING)
    gradients = [torch.autograd.grad(each.square().sum(), inputs) for each in (found, expected)]
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=100 * ROUNDING)


@pytest.mark.parametrize(("rank", "cp"), LAYOUTS)
@pytest.mark.parametrize("kind", ["one", "random", "each token"])
def test_segments_give_what_masks_give(kind: str, rank: int, cp: int) -> None:
    documents, slices = _documents(kind), zigzag_slices(LENGTH, rank, cp)
    _agree(lambda *qkv: segment_attention(*qkv, documents, slices, _variable_length), documents, rank, cp)


@pytest.mark.parametrize(("rank", "cp"), LAYOUTS)
@pytest.mark.parametrize("kind", ["one", "random", "each token"])
@pytest.mark.parametrize("rows", [1, 5, LENGTH])
def test_blocks_give_what_masks_give(rows: int, kind: str, rank: int, cp: int) -> None:
    documents, slices = _documents(kind), zigzag_slices(LENGTH, rank, cp)
    starts = None if kind == "one" else document_starts(documents)

    def compute(*qkv: Tensor) -> Tensor:
        q, k, v = (each.permute(1, 2, 0, 3) for each in qkv)
        out = attention_in_blocks(q, k, v, starts, slices, limit_bytes=rows * 4 * BATCH * HEADS * LENGTH)
        return out.permute(2, 0, 1, 3).flatten(2)

    _agree(compute, documents, rank, cp)


def test_segments_of_a_slice_inside_a_document() -> None:
    """Twelve positions on rank 0 of 2: [0, 3) and [9, 12); documents begin at 0, 2, 7 and 10."""
    starts = torch.tensor([[0, 0, 2, 2, 2, 2, 2, 7, 7, 7, 10, 10]])
    cut = segments(starts, zigzag_slices(12, 0, 2))
    assert cut.keys == ((0, 0, 3), (0, 7, 12))
    assert len(cut.query_ends) == len(cut.key_ends) == FEWEST_SEGMENTS + 1
    assert cut.query_ends.tolist()[:6] == [0, 2, 3, 4, 6, 6]  # lengths 2, 1 and 1, 2
    assert cut.key_ends.tolist()[:6] == [0, 2, 3, 6, 8, 8]  # the query at 9 sees 7, 8, 9


def test_starts_of_documents_that_use_an_index_again() -> None:
    assert document_starts(torch.tensor([[4, 4, 1, 4, 4]])).tolist() == [[0, 0, 2, 3, 3]]
