"""Text that comes in pieces is the text of all tokens."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import tokenizers

from nemotron3_megatron.data.tokenizer import HuggingFaceTokenizer
from nemotron3_megatron.evaluate.text import TextStream


@pytest.fixture(scope="module")
def bytes_only() -> HuggingFaceTokenizer:
    """Every byte is a token."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["a"], vocab_size=257, special_tokens=["<|endoftext|>"], show_progress=False)
    return HuggingFaceTokenizer.of(tokenizers.Tokenizer.from_str(trained.to_str()), "<|endoftext|>", "here")


def _pieces(tokenizer: HuggingFaceTokenizer, prompt: str, blocks: Sequence[Sequence[int]]) -> list[str]:
    stream = TextStream(tokenizer, tokenizer.encode(prompt))
    return [stream.add(block, last=place + 1 == len(blocks)) for place, block in enumerate(blocks)]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_characters_come_whole(bytes_only: HuggingFaceTokenizer, size: int) -> None:
    text = "xé €😀éé end"
    tokens = bytes_only.encode(text)
    assert len(tokens) == len(text.encode()) > len(text)
    blocks = [tokens[start : start + size] for start in range(0, len(tokens), size)]
    pieces = _pieces(bytes_only, "a prompt that ends in €", blocks)
    assert "".join(pieces) == text
    assert all("\ufffd" not in piece for piece in pieces)


def test_what_is_no_character_comes_at_the_end(bytes_only: HuggingFaceTokenizer) -> None:
    half = bytes_only.encode("é")[:1]
    assert _pieces(bytes_only, "a", [bytes_only.encode("b"), half, []]) == ["b", "", "\ufffd"]
    assert _pieces(bytes_only, "a", [half, bytes_only.encode("bc"), [bytes_only.eod]]) == ["", "\ufffdbc", ""]


def test_a_tokenizer_that_drops_the_first_space_keeps_it_between_pieces() -> None:
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({"<|endoftext|>": 0, "▁one": 1, "▁two": 2}, unk_token="<|endoftext|>")
    )
    words.decoder = tokenizers.decoders.Metaspace()
    tokenizer = HuggingFaceTokenizer.of(words, "<|endoftext|>", "here")
    stream = TextStream(tokenizer, [1])
    assert [stream.add([2]), stream.add([1, 2]), stream.add([0], last=True)] == [" two", " one two", ""]
