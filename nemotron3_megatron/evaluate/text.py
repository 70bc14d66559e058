"""Text of generated tokens, piece by piece."""

from __future__ import annotations

from collections.abc import Sequence

from nemotron3_megatron.data.tokenizer import Tokenizer

CONTEXT_TOKENS = 8
"""Prompt tokens decoded along with the first new ones: some tokenizers drop a space at the start of a text."""
INCOMPLETE = "\ufffd"
"""What a decoder puts in place of bytes that are no character yet."""


class TextStream:
    """Decodes tokens as they come and holds back characters that are not complete (one may span several tokens)."""

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self.tokenizer = tokenizer
        self.tokens = list(prompt[-CONTEXT_TOKENS:])
        self.start = 0
        """First token that is decoded along with new ones."""
        self.done = len(self.tokens)
        """Tokens whose text is out."""

    def add(self, tokens: Sequence[int], *, last: bool = False) -> str:
        """The text that is complete with these tokens; all of it when they are the last. The EOD has none."""
        self.tokens += [token for token in tokens if token != self.tokenizer.eod]
        before = self.tokenizer.decode(self.tokens[self.start : self.done])
        text = self.tokenizer.decode(self.tokens[self.start :])[len(before) :]
        if text.endswith(INCOMPLETE) and not last:
            return ""
        self.start, self.done = self.done, len(self.tokens)
        return text
