"""An attention layer that keeps the keys and values of all columns so far.

Shapes: B rows, S columns of the block, T columns in the cache, H hidden, N query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from nemotron3_megatron.evaluate.block import Block

SMALLEST_CAPACITY = 256
"""Columns that a cache first has room for; it doubles when it is full."""


class CachedAttention:
    """An attention ``TransformerLayer`` over its keys and values."""

    def __init__(self, layer: TransformerLayer) -> None:
        self.layer = layer
        self.keys: Tensor | None = None
        """(B, K, capacity, D); what lies beyond the cache's columns is never read."""
        self.values: Tensor | None = None

    def __call__(self, hidden: Tensor, block: Block) -> Tensor:
        """hidden (S, B, H) -> (S, B, H)."""
        attention = self.layer.self_attention
        parts = attention.get_query_key_value_tensors(self.layer.input_layernorm(hidden))
        query, key, value = (t.permute(1, 2, 0, 3) for t in parts)  # (B, heads, S, D)
        self.keys = _appended(self.keys, key, block.start)
        self.values = _appended(self.values, value, block.start)
        end = block.start + block.columns
        mixed = F.scaled_dot_product_attention(
            query,
            self.keys[:, :, :end],
            self.values[:, :, :end],
            attn_mask=block.allowed,
            is_causal=block.allowed is None and block.columns > 1,
            scale=self.layer.config.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        output, _ = attention.linear_proj(mixed.permute(2, 0, 1, 3).flatten(2))
        total: Tensor = hidden + output
        return total

    def commit(self, counts: Sequence[int]) -> None:
        """Columns taken back are overwritten, or not seen (``CachedStack``)."""


def _appended(cache: Tensor | None, new: Tensor, start: int) -> Tensor:
    """The cache with ``new`` (B, K, S, D) at column ``start``, in larger memory where it is full."""
    rows, heads, columns, width = new.shape
    end = start + columns
    if cache is None or cache.shape[2] < end:
        grown = new.new_empty(rows, heads, max(SMALLEST_CAPACITY, 2 * end), width)
        if cache is not None:
            grown[:, :, :start] = cache[:, :, :start]
        cache = grown
    cache[:, :, start:end] = new
    return cache
