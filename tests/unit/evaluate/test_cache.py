"""Decoding over caches against the model's own forward over the whole context, in float64."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron3_megatron.evaluate.attention_cache import SMALLEST_CAPACITY, CachedAttention
from nemotron3_megatron.evaluate.cached_stack import CachedStack, PositionWise
from nemotron3_megatron.evaluate.decoder import Decoder
from nemotron3_megatron.evaluate.mamba_cache import CachedMamba
from nemotron3_megatron.model.hybrid import Nemotron3Model

# In float64 sums alone would leave 1e-13, but Megatron-Core's router takes its sigmoid in float32 whatever the type of
# the model: where the last bit of an input differs, a score may move by one float32 rounding, 6e-8. That is multiplied
# by 2.5 (moe_router_topk_scaling_factor), and by the norms of what follows, tenfold at most in each of at most 4 MoE
# layers: 6e-6 of logits of order 1. A wrong column moves them by 1e-2.
TOLERANCE = 6e-6


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.no_grad():
        yield


def _tokens(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 64, (rows, columns), generator=torch.Generator().manual_seed(seed))


def _whole(model: Nemotron3Model, tokens: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(tokens, None)
    return logits


def _close(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return bool((actual - expected).abs().max() < TOLERANCE)


def test_blocks_of_any_length_give_the_logits_of_the_whole_context(exact: Nemotron3Model) -> None:
    tokens = _tokens(3, 45)
    expected = _whole(exact, tokens)
    assert expected.std() > 0.1
    assert not _close(expected[:, 1:], _whole(exact, tokens[:, 1:]))  # the first token is felt at every later one
    decoder, parts = Decoder(exact, 3), []
    # Longer and shorter than a chunk (8) and than the convolution (4), scanned and stepped, the whole and one by one.
    for block in tokens.split([13, 1, 10, 1, 1, 3, 8, 2, 6], dim=1):
        parts.append(decoder.logits(decoder.advance(block)))
    assert _close(torch.cat(parts, dim=1), expected)
    assert _close(decoder_logits(exact, tokens), expected)


def decoder_logits(model: Nemotron3Model, tokens: torch.Tensor) -> torch.Tensor:
    decoder = Decoder(model, len(tokens))
    return decoder.logits(decoder.advance(tokens))


@pytest.mark.parametrize("blocks", [[9, 1, 1, 1, 4], [3, 13], [1] * 16])
def test_rows_of_unequal_length_do_not_feel_their_padding(exact: Nemotron3Model, blocks: list[int]) -> None:
    lengths = (16, 5, 1)
    tokens = _tokens(3, 16)
    exists = torch.arange(16) >= 16 - torch.tensor(lengths)[:, None]
    decoder = Decoder(exact, 3)
    parts = [
        decoder.logits(decoder.advance(block, valid))
        for block, valid in zip(tokens.split(blocks, dim=1), exists.split(blocks, dim=1), strict=True)
    ]
    logits = torch.cat(parts, dim=1)
    for row, length in enumerate(lengths):
        assert _close(logits[row, 16 - length :], _whole(exact, tokens[row : row + 1, 16 - length :])[0])


@pytest.mark.parametrize("equal", [True, False], ids=["same count in all rows", "a count for each row"])
def test_columns_taken_back_leave_no_trace(exact: Nemotron3Model, equal: bool) -> None:
    chosen = random.Random(0)
    decoder = Decoder(exact, 3)
    decoder.advance(_tokens(3, 6, seed=1))
    kept = [list(row) for row in _tokens(3, 6, seed=1).tolist()]
    for place in range(12):
        block = _tokens(3, 10 if place == 7 else 4, seed=place + 2)
        logits = decoder.logits(decoder.advance(block, revocable=True))
        for row in range(3):
            context = torch.tensor([kept[row] + block[row].tolist()])
            assert _close(logits[row], _whole(exact, context)[0, len(kept[row]) :])
        common = chosen.randint(0, 4)
        counts = [common if equal else chosen.randint(0, 4) for _ in range(3)]
        decoder.stack.commit(counts)
        for row, count in enumerate(counts):
            kept[row] += block[row, :count].tolist()
    assert len({len(row) for row in kept}) == (1 if equal else 3)


def test_a_cache_that_is_full_grows(exact: Nemotron3Model) -> None:
    tokens = _tokens(1, SMALLEST_CAPACITY + 10)
    decoder = Decoder(exact, 1)
    for block in tokens[:, :-1].split([100, SMALLEST_CAPACITY - 101, 10], dim=1):
        decoder.advance(block)
    assert _close(decoder.logits(decoder.advance(tokens[:, -1:]))[:, 0], _whole(exact, tokens)[:, -1])


class _Work(TorchDispatchMode):
    """Adds up the elements that all operations write."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and func._schema.name not in ("aten::view", "aten::slice"):
                self.elements += tensor.numel()
        return result


def test_a_tokens_work_does_not_grow_with_the_context(exact: Nemotron3Model) -> None:
    def work(context: int) -> int:
        stack = CachedStack(exact.decoder, 2)
        stack.layers = [layer for layer in stack.layers if not isinstance(layer, CachedAttention)]
        assert {type(layer) for layer in stack.layers} == {CachedMamba, PositionWise}
        stack.advance(torch.ones(context, 2, 64, dtype=torch.float64))
        with _Work() as counted:
            stack.advance(torch.ones(1, 2, 64, dtype=torch.float64))
        return counted.elements

    assert work(300) == work(9) > 1000


def test_blocks_are_committed_in_order(exact: Nemotron3Model) -> None:
    decoder = Decoder(exact, 1)
    with pytest.raises(RuntimeError, match="no block"):
        decoder.stack.commit([1])
    decoder.advance(_tokens(1, 2), revocable=True)
    with pytest.raises(RuntimeError, match="neither committed nor taken back"):
        decoder.advance(_tokens(1, 1))
