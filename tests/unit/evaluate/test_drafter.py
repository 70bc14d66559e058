"""Drafts against multi-token prediction as it is trained: one pass over tokens that are all known."""

from __future__ import annotations

import random

import pytest
import torch

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.decoder import Decoder
from nemotron3_megatron.evaluate.drafter import Drafter
from nemotron3_megatron.model.hybrid import Nemotron3Model

# As in test_cache.py, where the same layers are counted.
TOLERANCE = 6e-6
DEPTHS = 2


def _trained(model: Nemotron3Model, tokens: list[int]) -> torch.Tensor:
    """(1 + DEPTHS, s, V) logits of training's forward; depth d at position p predicts token p + d + 1."""
    ids = torch.tensor([tokens])
    hidden = model.decoder(hidden_states=model.embedding(input_ids=ids, position_ids=None), attention_mask=None)
    depths = model.mtp(
        input_ids=ids, position_ids=ids, hidden_states=hidden, attention_mask=None, embedding=model.embedding
    )
    logits, _ = model.output_layer(depths)
    return torch.stack(logits[:, 0].chunk(1 + DEPTHS))


@pytest.mark.parametrize("lengths", [(7, 7, 7), (12, 1, 4), (2, 1, 3)])
@torch.no_grad()
def test_every_draft_is_what_training_computes(exact: Nemotron3Model, lengths: tuple[int, ...]) -> None:
    chosen, longest = random.Random(0), max(lengths)
    texts = [[chosen.randrange(64) for _ in range(length)] for length in lengths]
    decoder, drafter = Decoder(exact, 3), Drafter(exact, 3, DEPTHS)
    padded = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    exists = torch.arange(longest) >= longest - torch.tensor(lengths)[:, None]
    for start, end in ((0, longest // 2), (longest // 2, longest - 1)):
        if start < end:
            hidden = decoder.advance(padded[:, start:end], exists[:, start:end])
            drafter.absorb(hidden, padded[:, start + 1 : end + 1], exists[:, start:end])
    block = padded[:, -1:]
    for _ in range(6):
        hidden = decoder.advance(block, revocable=True)
        counts = [chosen.randint(1, block.shape[1]) for _ in texts]
        following = torch.tensor([[chosen.randrange(64) for _ in range(block.shape[1])] for _ in texts])
        for row, count in enumerate(counts):
            following[row, : count - 1] = block[row, 1:count]  # drafts that were accepted
            texts[row] += following[row, :count].tolist()
        decoder.stack.commit(counts)
        drafts: list[list[int]] = [[] for _ in texts]

        def choose(row: int, logits: torch.Tensor, drafts: list[list[int]] = drafts) -> int:
            depth, newest = len(drafts[row]) + 1, len(texts[row]) - 1
            expected = _trained(exact, texts[row] + drafts[row])[depth, newest - 1]
            assert (logits - expected).abs().max() < TOLERANCE
            drafts[row].append(chosen.randrange(64))
            return drafts[row][-1]

        block = torch.cat(
            [torch.tensor([[text[-1]] for text in texts]), drafter.draft(hidden, counts, following, choose)], dim=1
        )
        assert block[:, 1:].tolist() == drafts


def test_more_drafts_than_trained_depths_need_a_shared_block(exact: Nemotron3Model) -> None:
    if exact.config.mtp_use_repeated_layer:
        assert len(Drafter(exact, 1, 5).depths) == 5
    else:
        with pytest.raises(UserError, match=r"(?s)2 depths.*nearest legal: draft=2"):
            Drafter(exact, 1, 3)
