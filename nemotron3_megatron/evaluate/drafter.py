"""Drafts of the next tokens from the multi-token-prediction block, computed as in training.

Depth d reads, at position p, the output of depth d - 1 there (depth 0 is the main model) and the token at p + d, and
predicts the token at p + d + 1; its attention sees its own earlier positions. At the newest position p the tokens from
p + 2 on are drafts themselves. So the cache of each depth ends one committed position before that of the depth above
it: what it computed from drafts is taken back and computed again when the tokens are known.

Shapes: B rows, S columns of a block, D depths, H hidden, V vocabulary of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.cached_stack import CachedStack
from nemotron3_megatron.evaluate.decoder import embedded
from nemotron3_megatron.model.hybrid import Nemotron3Model

ChooseDraft = Callable[[int, Tensor], int]
"""Row and logits (V,) -> the token drafted next in that row."""


class Depth:
    """One depth: its cache, and its output at the last committed column, which the next depth starts from."""

    def __init__(self, layer: MultiTokenPredictionLayer, rows: int) -> None:
        weight = layer.eh_proj.weight
        self.layer = layer
        self.stack = CachedStack(layer.mtp_model_layer, rows)
        self.last = weight.new_zeros(1, rows, weight.shape[0])
        """(1, B, H)"""
        self.exists = torch.zeros(rows, 1, dtype=torch.bool, device=weight.device)
        """(B, 1) False until a row has a committed column."""

    def advance(self, below: Tensor, vectors: Tensor, exists: Tensor, *, revocable: bool) -> Tensor:
        """Outputs (S, B, H) from those of the depth above and the tokens' embeddings (S, B, H); exists (B, S)."""
        layer = self.layer
        joined, _ = layer.eh_proj(torch.cat([layer.enorm(vectors), layer.hnorm(below)], dim=-1))
        output: Tensor = layer.final_layernorm(self.stack.advance(joined, exists, revocable=revocable))
        return output

    def hand_on(self, output: Tensor, exists: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
        """What the next depth reads, one committed column more: (1 + S, B, H) and (B, 1 + S).

        ``ends`` (B,) is the last column committed in each row; this depth remembers its output there.
        """
        rows = torch.arange(len(ends), device=ends.device)
        outputs, everything = torch.cat([self.last, output]), torch.cat([self.exists, exists], dim=1)
        self.last, self.exists = output[ends, rows][None], exists[rows, ends][:, None]
        return outputs, everything


class Drafter:
    """The depths of multi-token prediction over their caches."""

    def __init__(self, model: Nemotron3Model, rows: int, drafts: int) -> None:
        """``drafts`` is the number of depths to run, at least 1; a block that depths share runs any number of times.

        Raises:
            UserError: the model has no such depth.
        """
        trained = model.config.mtp_num_layers or 0
        shared = bool(model.config.mtp_use_repeated_layer)
        if drafts > trained and not (trained and shared):
            why = f"the model has {trained} depths of multi-token prediction"
            raise UserError(f"draft={drafts}", why=why, nearest=f"draft={trained}")
        self.model = model
        self.depths = [Depth(model.mtp.layers[0 if shared else depth], rows) for depth in range(drafts)]

    def absorb(self, hidden: Tensor, following: Tensor, valid: Tensor | None) -> None:
        """Commit columns whose following tokens are all known: a prompt's.

        Args:
            hidden: (S, B, H) of the main model.
            following: (B, S) the token after each column.
            valid: (B, S) bool, False where a row has no such column; None: all exist.
        """
        columns = following.shape[1]
        below, vectors = hidden, embedded(self.model, following)
        exists = torch.ones_like(following, dtype=torch.bool) if valid is None else valid
        ends = torch.full_like(following[:, 0], columns - 1)
        for depth in self.depths:
            below, exists = below[:columns], exists[:, :columns]
            output = depth.advance(below, vectors, exists, revocable=False)
            below, exists = depth.hand_on(output, exists, ends)

    def draft(self, hidden: Tensor, counts: Sequence[int], following: Tensor, choose: ChooseDraft) -> Tensor:
        """Commit the columns that verification accepted, and draft what follows the newest token.

        Args:
            hidden: (S, B, H) of the main model.
            counts: columns that count in each row, 1 to S.
            following: (B, S) the token after each column, up to the newest one.
            choose: draws each draft.

        Returns:
            (B, D) int64 drafts.
        """
        rows = torch.arange(len(counts), device=hidden.device)
        ends = torch.tensor(counts, device=hidden.device) - 1
        tokens = F.pad(following, (0, len(self.depths)))
        below, exists = hidden, torch.ones_like(following, dtype=torch.bool)
        for number, depth in enumerate(self.depths):
            vectors = embedded(self.model, tokens[:, : len(below)])
            output = depth.advance(below, vectors, exists, revocable=True)
            depth.stack.commit(counts)
            logits, _ = self.model.output_layer(output[ends + number, rows][None])
            chosen = [choose(row, values) for row, values in enumerate(logits[0])]
            tokens[rows, ends + number + 1] = torch.tensor(chosen, device=tokens.device)
            below, exists = depth.hand_on(output, exists, ends)
        return tokens[rows[:, None], ends[:, None] + 1 + torch.arange(len(self.depths), device=rows.device)]
