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


def document_params(documents: Tensor, boundaries: Tensor | None = None) -> PackedSeqParams:
    """Carry document indices (B, G) int32 of the *whole* sequence through Megatron's layers.

    ``sbhd`` keeps batch and sequence dimensions apart, so every other layer works as without packing.

    Args:
        documents: indices.
        boundaries: (n + 1,) int32 cumulative lengths of the documents, rows end to end, for kernels that want them;
            None: they find them in ``documents``, for which the CPU must wait.
    """
    return PackedSeqParams(qkv_format="sbhd", seq_idx=documents.to(torch.int32), cu_seqlens_q=boundaries)


def zigzag_positions(length: int, cp_rank: int, cp_size: int, device: torch.device) -> Tensor:
    """Global positions (S,) of the tokens that a context-parallel rank holds; length is G."""
    if length % (2 * cp_size):
        raise ValueError(f"sequence length {length} is not divisible by 2 * cp = {2 * cp_size}")
    chunks = torch.arange(length, device=device).chunk(2 * cp_size)
    return torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])


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
    sequence while queries and scores stay local.
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
        cp_size = self.cp_group.size()
        if cp_size > 1:
            key = gather_sequence(key, self.cp_group)
            value = gather_sequence(value, self.cp_group)
        mask = self._mask(query, key.shape[0], packed_seq_params)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)

    def _mask(self, query: Tensor, length: int, packed: PackedSeqParams | None) -> Tensor | None:
        """Allowed (query, key) pairs as (B or 1, 1, S, G) bool; None where plain causal attention suffices."""
        cp_size = self.cp_group.size()
        if cp_size == 1 and packed is None:
            return None
        positions = torch.arange(length, device=query.device)
        mine = zigzag_positions(length, self.cp_group.rank(), cp_size, query.device) if cp_size > 1 else positions
        allowed = (mine[:, None] >= positions[None, :])[None]
        if packed is not None:
            documents = packed.seq_idx
            allowed = allowed & (documents[:, mine, None] == documents[:, None, :])
        return allowed[:, None]
