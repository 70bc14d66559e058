"""Core attention in torch: grouped queries, causal, documents isolated, context parallel.

Shapes: S local sequence, G global sequence (S * cp), B batch, N query heads, K key/value heads, D head dim.
Under context parallelism the sequence is cut into 2 * cp chunks and rank r holds chunks r and 2 * cp - 1 - r
(the zig-zag that balances causal work), as everywhere in Megatron-Core.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.utils.checkpoint import checkpoint

from nemotron3_megatron.model.documents import document_starts

SCORE_BYTES = 256 * 2**20
"""Queries are taken in blocks whose scores, in float32, would fill so much (the kernels make less or none of them, but
the mask of a block is real). Short sequences are one block."""


def document_params(documents: Tensor, boundaries: Tensor | None = None) -> PackedSeqParams:
    """Carry document indices (B, G) int32 of the *whole* sequence through Megatron's layers.

    ``sbhd`` keeps batch and sequence dimensions apart, so every other layer works as without packing.

    Args:
        documents: indices.
        boundaries: (n + 1,) int32 cumulative lengths of the documents, rows end to end, for kernels that want them;
            None: they find them in ``documents``, for which the CPU must wait.
    """
    return PackedSeqParams(qkv_format="sbhd", seq_idx=documents.to(torch.int32), cu_seqlens_q=boundaries)


def zigzag_slices(length: int, cp_rank: int, cp_size: int) -> tuple[tuple[int, int], ...]:
    """The one or two slices [first, end) of the whole sequence that a rank holds, in the order it holds them."""
    if cp_size == 1:
        return ((0, length),)
    if length % (2 * cp_size):
        raise ValueError(f"sequence length {length} is not divisible by 2 * cp = {2 * cp_size}")
    chunk = length // (2 * cp_size)
    return tuple((index * chunk, (index + 1) * chunk) for index in (cp_rank, 2 * cp_size - 1 - cp_rank))


def zigzag_positions(length: int, cp_rank: int, cp_size: int, device: torch.device) -> Tensor:
    """Global positions (S,) of the tokens that a context-parallel rank holds; length is G."""
    slices = zigzag_slices(length, cp_rank, cp_size)
    return torch.cat([torch.arange(first, end, device=device) for first, end in slices])


def whole_documents(documents: Tensor, cp_group: ProcessGroup) -> Tensor:
    """Document indices (B, S) of this rank's part of the sequence -> (B, G) of the whole one."""
    if cp_group.size() == 1:
        return documents
    return gather_sequence(documents.t(), cp_group).t().contiguous()


class _GatherSequence(torch.autograd.Function):
    """All-gather (S, ...) over context parallel ranks into natural order (G, ...); backward sums and slices."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, group: ProcessGroup) -> Tensor:
        size, rank = group.size(), group.rank()
        shards = local.new_empty(size * local.shape[0], *local.shape[1:])
        torch.distributed.all_gather_into_tensor(shards, local.contiguous(), group=group)
        length = shards.shape[0]
        order = torch.cat([zigzag_positions(length, r, size, local.device) for r in range(size)])
        ctx.group, ctx.mine = group, zigzag_positions(length, rank, size, local.device)
        return torch.empty_like(shards).index_copy_(0, order, shards)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = grads[0].contiguous()
        torch.distributed.all_reduce(grad, group=ctx.group)
        return grad.index_select(0, ctx.mine), None


def gather_sequence(local: Tensor, group: ProcessGroup) -> Tensor:
    """(S, ...) of this rank -> (G, ...) of all ranks in natural order; differentiable."""
    gathered: Tensor = _GatherSequence.apply(local, group)  # type: ignore[no-untyped-call]
    return gathered


class DocumentAttention(nn.Module):
    """``core_attention`` over scaled-dot-product attention.

    With context parallelism, keys and values are gathered over the group: memory for them grows with the whole
    sequence while queries stay local. Memory is linear in the sequence: where documents or ranks need a mask, queries
    go in blocks (``SCORE_BYTES``), whose masks are made anew in the backward pass.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: object,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **unused: object,
    ) -> None:
        super().__init__()
        if config.attention_dropout:
            raise ValueError("attention dropout is not implemented: Nemotron 3 trains without dropout")
        self.scale = softmax_scale
        self.cp_group: ProcessGroup = pg_collection.cp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: object,
    ) -> Tensor:
        """query (S, B, N, D), key and value (S, B, K, D) -> (S, B, N * D)."""
        documents = None if packed_seq_params is None else packed_seq_params.seq_idx
        return document_attention(query, key, value, documents, self.cp_group, self.scale)


def document_attention(
    query: Tensor, key: Tensor, value: Tensor, documents: Tensor | None, cp_group: ProcessGroup, scale: float | None
) -> Tensor:
    """What :class:`DocumentAttention` computes; documents (B, G), None: one."""
    cp_size = cp_group.size()
    if cp_size > 1:
        key = gather_sequence(key, cp_group)
        value = gather_sequence(value, cp_group)
    q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    if cp_size == 1 and documents is None:
        out = _attend(q, k, v, None, scale)
    else:
        slices = zigzag_slices(key.shape[0], cp_group.rank(), cp_size)
        starts = None if documents is None else document_starts(documents)
        out = attention_in_blocks(q, k, v, starts, slices, scale)
    return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def attention_in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor | None,
    slices: tuple[tuple[int, int], ...],
    scale: float | None = None,
    limit_bytes: int = SCORE_BYTES,
) -> Tensor:
    """Causal attention of some queries to a whole sequence, block by block of queries.

    Args:
        q: (B, N, S, D).
        k, v: (B, K, G, D).
        starts: (B, G) first position of each position's document; None: one document.
        slices: [first, end) of the whole sequence that q's rows are, one after the other.
        scale: of the scores; None: 1 / sqrt(D).
        limit_bytes: see ``SCORE_BYTES``.

    Returns:
        (B, N, S, D).
    """
    rows = max(limit_bytes // (4 * q.shape[0] * q.shape[1] * k.shape[2]), 1)
    blocks = [(at, min(at + rows, end)) for first, end in slices for at in range(first, end, rows)]
    # A document's start never decreases along the sequence: a block's first query sees furthest back.
    lows = [0] * len(blocks) if starts is None else starts[:, [first for first, _ in blocks]].amin(0).tolist()
    outputs, done = [], 0
    for (first, end), low in zip(blocks, lows, strict=True):
        mine = q[:, :, done : done + end - first]
        begins = None if starts is None else starts[:, first:end]
        arguments = (mine, k[:, :, low:end], v[:, :, low:end], begins, first, low, scale)
        if len(blocks) == len(slices):
            outputs.append(_block(*arguments))
        else:
            outputs.append(checkpoint(_block, *arguments, use_reentrant=False, preserve_rng_state=False))
        done += end - first
    return torch.cat(outputs, dim=2)


def _block(q: Tensor, k: Tensor, v: Tensor, begins: Tensor | None, first: int, low: int, scale: float | None) -> Tensor:
    """Queries from position ``first`` to keys from position ``low``; begins (B, rows) of the queries' documents."""
    keys = torch.arange(low, low + k.shape[2], device=q.device)
    allowed = (keys[first - low :, None] >= keys)[None]
    if begins is not None:
        allowed = allowed & (keys >= begins[:, :, None])
    return _attend(q, k, v, allowed[:, None], scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor | None, scale: float | None) -> Tensor:
    """``allowed`` (B or 1, 1, rows, keys) pairs; None: causal."""
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed, is_causal=allowed is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
