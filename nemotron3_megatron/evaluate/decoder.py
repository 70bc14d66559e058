"""The main model over caches.

Shapes: B rows, S columns of a block, H hidden, V vocabulary of the model. Megatron's hidden states are (S, B, H).
"""

from __future__ import annotations

from torch import Tensor

from nemotron3_megatron.evaluate.cached_stack import CachedStack
from nemotron3_megatron.model.hybrid import Nemotron3Model

PREFILL_COLUMNS = 1024
"""Prompt columns in one block: bounds the memory of a long prompt."""


class Decoder:
    """Hidden states and logits of the main model, continued from its cache."""

    def __init__(self, model: Nemotron3Model, rows: int) -> None:
        self.model = model
        self.stack = CachedStack(model.decoder, rows)

    def advance(self, tokens: Tensor, valid: Tensor | None = None, *, revocable: bool = False) -> Tensor:
        """tokens (B, S) int64 -> (S, B, H); ``valid`` and ``revocable`` as in ``CachedStack.advance``."""
        return self.stack.advance(embedded(self.model, tokens), valid, revocable=revocable)

    def logits(self, hidden: Tensor) -> Tensor:
        """(S, B, H) -> (B, S, V)."""
        logits, _ = self.model.output_layer(hidden)
        whole: Tensor = logits.transpose(0, 1)
        return whole


def embedded(model: Nemotron3Model, tokens: Tensor) -> Tensor:
    """tokens (B, S) -> (S, B, H); there is no position embedding."""
    vectors: Tensor = model.embedding(input_ids=tokens, position_ids=None)
    return vectors
