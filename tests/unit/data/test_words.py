"""Tokenising word by word: the ids and the words are those of the tokenizers library."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import chain

import numpy as np
import pytest
import tokenizers
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers, trainers

import nemotron3_megatron.data.words as words_module
from nemotron3_megatron.data.words import GPT2, WordTable, translated, word_pattern

# Patterns as published with the tokenizers of these names.
_CASED = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CONTRACTED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PATTERNS = {
    "gpt2": GPT2,
    "cl100k": rf"{_CONTRACTED}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST.replace('/', '')}",
    "tekken": rf"{_CASED}*{_LOWER}+|{_CASED}+{_LOWER}*|\p{{N}}|{_REST}",
    "o200k": rf"{_CASED}*{_LOWER}+{_CONTRACTED}?|{_CASED}+{_LOWER}*{_CONTRACTED}?|\p{{N}}{{1,3}}|{_REST}",
}
PLANE = [chr(code) for code in chain(range(0xD800), range(0xE000, 0x10000))]
TRICKY = [
    *"aZ09 '\n\r\t\"/-_.",
    "  ",
    "'s",
    "'LL",
    "'\u017f",
    "\u0130",
    "é",
    "e\u0301",
    "ǅ",
    "日",
    "本",
    "٣",
    "½",
    "ー",
]
TRICKY += ["\u00a0", "\u0085", "\u2028", "\u200d", "\u3000", "\x1c", "\x00", "\ufeff", "\ue000", "\u0378"]

Build = Callable[[str], tokenizers.Tokenizer]


def split_by(pattern: str) -> pre_tokenizers.Split:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def texts(seed: int, count: int = 40) -> list[str]:
    rng = random.Random(seed)
    return ["".join(rng.choices(TRICKY, k=rng.randrange(120))) for _ in range(count)]


@pytest.fixture(scope="module")
def build() -> Build:
    """build(pattern) -> a byte-level BPE of 600 entries whose pre-tokenizer has this pattern."""

    def make(pattern: str) -> tokenizers.Tokenizer:
        tokenizer = tokenizers.Tokenizer(models.BPE())
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern == GPT2)
        own = [] if pattern == GPT2 else [split_by(pattern)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*own, bytes_of]) if own else bytes_of
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<eod>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts(1, count=300), trainer=trainer)
        tokenizer.encode_special_tokens = True
        return tokenizer

    return make


def never(texts: list[str]) -> list[NDArray[np.int64]]:
    assert not texts, "every text is to be found word by word"
    return []


def table(tokenizer: tokenizers.Tokenizer, whole: Callable[[list[str]], list[NDArray[np.int64]]] = never) -> WordTable:
    pattern = word_pattern(tokenizer)
    assert pattern is not None
    return WordTable(tokenizer, pattern, whole)


def library(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> list[list[int]]:
    return [encoding.ids for encoding in tokenizer.encode_batch(texts, add_special_tokens=False)]


def as_lists(ids: list[NDArray[np.int64]]) -> list[list[int]]:
    return [part.tolist() for part in ids]


@pytest.mark.parametrize("name", PATTERNS)
def test_words_are_those_of_the_library(name: str) -> None:
    """Each character of the first plane beside letters, digits, spaces, apostrophes and itself; and random mixtures."""
    pattern = translated(PATTERNS[name])
    assert pattern is not None
    every = "".join(f"{c}a{c}{c} {c}1 '{c}A{c}\n" for c in PLANE)
    for text in [every, *texts(2)]:
        expected = [text[start:end] for _, (start, end) in split_by(PATTERNS[name]).pre_tokenize_str(text)]
        assert pattern.findall(text) == expected


def test_a_class_without_members_matches_nothing() -> None:
    pattern = translated(r"[^\s\S]|a[^\s\S]?|\p{L}+")
    assert pattern is not None
    assert pattern.findall("a日🙂\ufffdb") == ["a", "日", "b"]


@pytest.mark.parametrize("name", PATTERNS)
def test_ids_are_those_of_the_library(name: str, build: Build) -> None:
    tokenizer = build(PATTERNS[name])
    encoder = table(tokenizer)
    for seed in (3, 4):  # the second time most words are known
        batch = [*texts(seed), "", "<eod> is text", " "]
        assert as_lists(encoder.encode(batch)) == library(tokenizer, batch)
    assert encoder.encode([]) == []
    assert as_lists(encoder.encode(["", ""])) == [[], []]


def test_what_the_pattern_does_not_cover_goes_to_the_library(build: Build) -> None:
    """Characters beyond the first plane; and what no alternative matches, which the library takes as words."""
    seen: list[str] = []

    def whole(texts: list[str]) -> list[NDArray[np.int64]]:
        seen.extend(texts)
        return [np.array(ids) for ids in library(tokenizer, texts)]

    tokenizer = build(GPT2)
    batch = ["plain", "with 🙂 in it", "", "plain again", "\U00020000", "last"]
    assert as_lists(table(tokenizer, whole).encode(batch)) == library(tokenizer, batch)
    assert seen == ["with 🙂 in it", "\U00020000"]
    seen.clear()
    tokenizer = build(r"\p{L}+|\p{N}")
    batch = ["abc1abc", "a-b", "abc"]
    assert as_lists(table(tokenizer, whole).encode(batch)) == library(tokenizer, batch)
    assert seen == ["a-b"]


def test_the_table_starts_anew(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words_module, "_MOST_WORDS", 20)
    tokenizer = build(GPT2)
    encoder = table(tokenizer)
    for seed in range(5, 9):
        assert as_lists(encoder.encode(texts(seed))) == library(tokenizer, texts(seed))


def test_new_words_only_leave_it_to_the_library_for_a_while(build: Build) -> None:
    """Of batches of words that never repeat the first is looked up, the next seven are not."""
    asked: list[int] = []

    def whole(texts: list[str]) -> list[NDArray[np.int64]]:
        asked.append(len(texts))
        return [np.array(ids, dtype=np.int64) for ids in library(tokenizer, texts)]

    tokenizer = build(GPT2)
    encoder = table(tokenizer, whole)
    letters = str.maketrans("0123456789", "abcdefghij")
    for number in range(10):
        batch = [" ".join(str(10**6 * number + i).translate(letters) for i in range(12_000))]
        assert as_lists(encoder.encode(batch)) == library(tokenizer, batch)
    assert asked == [0, 1, 1, 1, 1, 1, 1, 1, 0, 1]


@pytest.mark.parametrize(
    "pattern",
    [
        r"(\p{L})+",
        r"\p{N}{1,3}+",
        r"\p{N}{2}?",
        r"\b\p{L}+",
        r"^\s",
        r".+",
        r"[a-z&&[^c]]+",
        r"(?i:\p{Ll})",
        r"(?<=a)b",
        r"\x41",
    ],
)
def test_patterns_that_are_not_translated(pattern: str) -> None:
    assert translated(pattern) is None


def test_tokenizers_that_are_not_taken_word_by_word(build: Build) -> None:
    def changed(change: Callable[[tokenizers.Tokenizer], object]) -> tokenizers.Tokenizer:
        tokenizer = build(GPT2)
        change(tokenizer)
        return tokenizer

    def prefixed(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)

    def removing(tokenizer: tokenizers.Tokenizer) -> None:
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(r"\s"), "removed"), bytes_of])

    assert word_pattern(changed(lambda tokenizer: None)) is not None
    assert word_pattern(changed(lambda tokenizer: tokenizer.add_tokens([AddedToken("fox")]))) is None
    assert word_pattern(changed(lambda tokenizer: setattr(tokenizer, "normalizer", normalizers.NFC()))) is None
    assert word_pattern(changed(lambda tokenizer: setattr(tokenizer, "encode_special_tokens", False))) is None
    assert word_pattern(changed(lambda tokenizer: setattr(tokenizer, "pre_tokenizer", None))) is None
    assert word_pattern(changed(lambda tokenizer: setattr(tokenizer.model, "dropout", 0.1))) is None
    assert word_pattern(changed(prefixed)) is None
    assert word_pattern(changed(removing)) is None
    assert word_pattern(tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))) is None
