"""Megatron-Core's hybrid stack over caches: blocks of columns go in, each layer continues from what it kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor, nn

from nemotron3_megatron.evaluate.attention_cache import CachedAttention
from nemotron3_megatron.evaluate.block import Block, block_of
from nemotron3_megatron.evaluate.mamba_cache import CachedMamba


class CachedLayer(Protocol):
    """A layer and what it keeps of earlier columns."""

    def __call__(self, hidden: Tensor, block: Block) -> Tensor:
        """hidden (S, B, H) of the block's columns -> (S, B, H)."""

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` columns of the last block in row b."""


class PositionWise:
    """A layer in which positions do not meet: MoE or MLP."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer

    def __call__(self, hidden: Tensor, block: Block) -> Tensor:
        """hidden (S, B, H) -> (S, B, H)."""
        output: Any = self.layer(hidden_states=hidden, attention_mask=None)
        result: Tensor = output[0] if isinstance(output, tuple) else output
        return result

    def commit(self, counts: Sequence[int]) -> None:
        """Nothing is kept."""


class CachedStack:
    """The layers of a hybrid stack, as in its own forward, over one cache."""

    def __init__(self, stack: HybridStack, rows: int) -> None:
        self.layers: list[CachedLayer] = [_cached(layer, rows) for layer in stack.layers]
        self.final_norm: nn.Module | None = getattr(stack, "final_norm", None)
        self.rows = rows
        self.device = next(stack.parameters()).device
        self.length = 0
        """Columns in the cache."""
        self.seen: Tensor | None = None
        """(rows, length) bool, columns that exist; None: all."""
        self.block: Block | None = None
        """A revocable block that waits for :meth:`commit`."""

    def advance(self, hidden: Tensor, valid: Tensor | None = None, *, revocable: bool = False) -> Tensor:
        """Run a block of columns through the stack.

        Args:
            hidden: (S, B, H) embeddings.
            valid: (B, S) bool, False where a row has no such column; None: all exist.
            revocable: the block counts only as far as a following :meth:`commit` says.

        Returns:
            (S, B, H), after the final norm where the stack has one.

        Raises:
            RuntimeError: the last block is not committed.
        """
        if self.block is not None:
            raise RuntimeError("the last block is neither committed nor taken back")
        block = block_of(self.seen, self.length, hidden.shape[0], valid, revocable=revocable, device=self.device)
        for layer in self.layers:
            hidden = layer(hidden, block)
        self.block = block
        if not revocable:
            self.commit([block.columns] * self.rows)
        normed: Tensor = hidden if self.final_norm is None else self.final_norm(hidden)
        return normed

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first ``counts[b]`` columns of the last block in row b, as if no others had been given.

        Raises:
            RuntimeError: no block waits.
        """
        if self.block is None:
            raise RuntimeError("there is no block to commit")
        block, columns = self.block, max(counts)
        if block.valid is not None or self.seen is not None or min(counts) < columns:
            self._see(block, counts, columns)
        for layer in self.layers:
            layer.commit(counts)
        self.length += columns
        self.block = None

    def _see(self, block: Block, counts: Sequence[int], columns: int) -> None:
        ends = torch.tensor(counts, device=self.device)
        new = torch.arange(columns, device=self.device) < ends[:, None]
        if block.valid is not None:
            new = new & block.valid[:, :columns]
        before = new.new_ones(self.rows, self.length) if self.seen is None else self.seen
        self.seen = torch.cat([before, new], dim=1)


def _cached(layer: nn.Module, rows: int) -> CachedLayer:
    if isinstance(layer, MambaLayer):
        return CachedMamba(layer, rows)
    if isinstance(getattr(layer, "self_attention", None), SelfAttention):
        return CachedAttention(layer)
    return PositionWise(layer)
