"""Token ids of many texts at several times the speed of the library: each distinct word is tokenised once.

A byte-level BPE merges inside the words of its pre-tokenizer only, so the ids of a text are those of its words end to
end. Words repeat, and Python's ``re`` finds them faster than the library does, whose time mostly goes there.

The pre-tokenizer's pattern is written in the language of Oniguruma. What the two languages have in common is kept, and
each class of characters is replaced by the members that the library itself finds for it, so that versions of Unicode
cannot differ. That covers the patterns of GPT-2, cl100k, o200k, tekken and their relatives; for a pattern with anything
else, or another kind of tokenizer, ``word_pattern`` gives None. Members are looked up in the first 65,536 code points:
``re`` has a table for these. A text with a character beyond them goes to the library whole.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import tokenizers

# tokenizers/src/pre_tokenizers/byte_level.rs, the pattern of ByteLevel(use_regex=True)
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

_CLASS = r"\[(?:\\.|[^\]\\\[&])*\]|\\[pP]\{\^?\w+\}|\\[sSwWdDrnt]"
# Beside classes: contractions in any case, groups, looking ahead, alternatives, repetition, literals. Not among them is
# what the two languages read differently, such as {1,3}+ and {2}?, nor a capturing group, which changes findall.
_REPEAT = r"(?:[?*+][?+]?|\{\d+(?:,\d*)?\})(?![?*+{])"
_COMMON = re.compile(rf"(?:{_CLASS}|{_REPEAT}|\(\?i:[a-z'|]*\)|\(\?[:!=]|\)|\||[ '/a-z])*")
_PLANE = "".join(map(chr, chain(range(0xD800), range(0xE000, 0x10000))))
"""Every character of the first plane."""
_MOST_WORDS = 1 << 19
"""The table starts anew when it has more: about 120 MB."""
# A word costs the library twice as much alone as in its text. Where words hardly repeat (Chinese, base64) it takes the
# whole text, and only one batch in eight looks whether that has changed. Small batches tell nothing.
_MOST_NEW = 0.25
_ENOUGH_WORDS = 10_000
_WHOLE_BATCHES = 7


class WordTable:
    """Encodes texts with the ids of all words seen so far.

    Args:
        tokenizer: one for which ``word_pattern`` gave ``pattern``.
        encode_whole: ids of texts that ``pattern`` does not cover.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        pattern: re.Pattern[str],
        encode_whole: Callable[[list[str]], list[NDArray[np.int64]]],
    ) -> None:
        from tokenizers import Tokenizer, pre_tokenizers

        self._find = pattern.findall
        self._encode_whole = encode_whole
        self._whole_batches = 0
        """So many batches from now on go to the library."""
        self._word_tokenizer = Tokenizer(tokenizer.model)
        self._word_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        self._clear()

    def encode(self, texts: Sequence[str]) -> list[NDArray[np.int64]]:
        """Ids of each text, (tokens,) int64."""
        if self._whole_batches:
            self._whole_batches -= 1
            return self._encode_whole(list(texts))
        if len(self._rows) > _MOST_WORDS:
            self._clear()
        split = [self._split(text) for text in texts]
        by_words = iter(self._look_up([words for words in split if words is not None]))
        whole = iter(self._encode_whole([text for text, words in zip(texts, split, strict=True) if words is None]))
        return [next(whole if words is None else by_words) for words in split]

    def _clear(self) -> None:
        self._rows = _Rows()
        self._ids = np.empty(0, np.int64)
        self._bounds = np.zeros(1, np.int64)
        """The ids of row i are ``_ids[_bounds[i]:_bounds[i + 1]]``."""

    def _split(self, text: str) -> list[str] | None:
        """The words; None where some of the text is in none, such as a character beyond the first plane."""
        words: list[str] = self._find(text)
        return words if "".join(words) == text else None

    def _look_up(self, texts: Sequence[list[str]]) -> list[NDArray[np.int64]]:
        counts = [len(words) for words in texts]
        rows = np.fromiter(map(self._rows.__getitem__, chain.from_iterable(texts)), np.int64, sum(counts))
        if len(rows) > _ENOUGH_WORDS and len(self._rows.new) > _MOST_NEW * len(rows):
            self._whole_batches = _WHOLE_BATCHES
        self._learn()
        first = self._bounds[rows]
        lengths = self._bounds[rows + 1] - first
        ends = np.cumsum(lengths)
        ids = self._ids[np.repeat(first - ends + lengths, lengths) + np.arange(lengths.sum())]
        text_ends = np.concatenate(([0], ends))[np.cumsum(counts, dtype=np.int64)]
        return np.split(ids, text_ends[:-1]) if texts else []

    def _learn(self) -> None:
        """Tokenise the words that were new."""
        new, self._rows.new = self._rows.new, []
        if not new:
            return
        found = self._word_tokenizer.encode(new, is_pretokenized=True, add_special_tokens=False)
        lengths = np.bincount(np.array(found.word_ids, dtype=np.int64), minlength=len(new))
        self._ids = np.concatenate((self._ids, np.array(found.ids, dtype=np.int64)))
        self._bounds = np.concatenate((self._bounds, self._bounds[-1] + np.cumsum(lengths)))


class _Rows(dict[str, int]):
    """The row of each word in the table; one that is asked for the first time gets the next."""

    def __init__(self) -> None:
        super().__init__()
        self.new: list[str] = []
        """Words in rows that are not filled yet."""

    def __missing__(self, word: str) -> int:
        row = self[word] = len(self)
        self.new.append(word)
        return row


def word_pattern(tokenizer: tokenizers.Tokenizer) -> re.Pattern[str] | None:
    """What finds the words of a tokenizer's pre-tokenizer in text of the first plane.

    Returns:
        None: the tokenizer is no byte-level BPE that takes text as it is, or its pattern has no counterpart.
    """
    from tokenizers import models

    added = tokenizer.get_added_tokens_decoder().values()
    text_is_text = tokenizer.encode_special_tokens and all(token.special for token in added)
    bpe = isinstance(tokenizer.model, models.BPE) and not tokenizer.model.dropout
    if not (bpe and text_is_text and tokenizer.normalizer is None and tokenizer.pre_tokenizer is not None):
        return None
    pattern = _pattern(json.loads(tokenizer.pre_tokenizer.__getstate__()))
    return None if pattern is None else translated(pattern)


def _pattern(pre_tokenizer: dict[str, Any]) -> str | None:
    """The pattern of a pre-tokenizer given as in a ``tokenizer.json``, if it splits by one and then maps bytes."""
    match pre_tokenizer:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    return None


@cache
def translated(pattern: str) -> re.Pattern[str] | None:
    """A pattern of Oniguruma for Python and text of the first plane; None: it has something we do not translate."""
    if not _COMMON.fullmatch(pattern):
        return None
    return re.compile(re.sub(_CLASS, lambda found: _members(found[0]), pattern))


def _members(characters: str) -> str:
    """A class of characters, written as the ranges of code points that the library finds for it."""
    from tokenizers import Regex, normalizers

    others = set(normalizers.Replace(Regex(characters), "").normalize_str(_PLANE))
    codes = np.array([ord(character) for character in _PLANE if character not in others], dtype=np.int64)
    if not len(codes):
        return r"[\ud800]"  # no character of any text
    ranges = np.split(codes, np.flatnonzero(np.diff(codes) != 1) + 1)
    return f"[{''.join(f'\\u{run[0]:04x}-\\u{run[-1]:04x}' for run in ranges)}]"
