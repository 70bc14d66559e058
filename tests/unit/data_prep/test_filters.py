"""Filters and dedup in whole preparations: what is kept, what the manifest says was dropped."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

from data_prep.manifest import Manifest
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.data.tokenizer import load_tokenizer

WORDS = [
    "the",
    "of",
    "to",
    "and",
    "that",
    "have",
    "with",
    "be",
    "river",
    "morning",
    "letter",
    "winter",
    "station",
    "garden",
    "window",
    "teacher",
    "road",
    "paper",
    "music",
    "question",
    "village",
    "number",
    "harbour",
    "yellow",
    "simple",
    "answer",
    "morning",
    "engine",
    "basket",
    "candle",
    "ocean",
    "mountain",
    "forest",
    "bridge",
]


def prose(seed: int, words: int = 120) -> str:
    """Sentences of common words, long and varied enough for the quality rules."""
    rng = random.Random(seed)
    lines = [" ".join(rng.choice(WORDS) for _ in range(12)).capitalize() + "." for _ in range(words // 12)]
    return "\n".join(lines)


def kept(directory: Path) -> list[str]:
    tokenizer = load_tokenizer(directory)
    corpus = IndexedTokens(directory / "train", vocab_size=tokenizer.vocab_size)
    return [tokenizer.decode(corpus.read(i, 0, int(n)).tolist()) for i, n in enumerate(corpus.lengths)]


def test_length(prepare, write_jsonl, tmp_path: Path, capsys) -> None:
    texts = ["x" * n for n in (3, 9, 10, 300, 301)]
    limits = ("filters.min_characters=10", "filters.max_characters=300")
    assert prepare([write_jsonl("t.jsonl", [*texts, prose(1)[:200]])], "out", *limits, "tokenizer.vocab_size=257") == 0
    assert kept(tmp_path / "out") == [texts[2], texts[3], prose(1)[:200]]
    assert Manifest.load(tmp_path / "out").dropped == {"too short": 2, "too long": 1}
    assert "dropped: 2 documents, too short" in capsys.readouterr().err


@pytest.mark.parametrize(("quality", "foreign_is_kept"), [("english", False), ("any", True)])
def test_quality(prepare, write_jsonl, tmp_path: Path, quality: str, foreign_is_kept: bool) -> None:
    foreign = prose(2)
    for word in ("the", "of", "to", "and", "that", "have", "with", "be"):
        foreign = foreign.replace(word, f"{word}z").replace(word.capitalize(), f"{word}z")
    bad = [
        "only a few words",  # fewer than 50
        "\n".join(["the same line of text to be repeated with no end and that is that"] * 20),
        " ".join("0123456789 the of" for _ in range(60)),  # few words with letters
    ]
    source = write_jsonl("t.jsonl", [prose(1), foreign, *bad, prose(3)])
    assert prepare([source], "out", f"filters.quality={quality}") == 0
    assert kept(tmp_path / "out") == [prose(1), *([foreign] if foreign_is_kept else []), prose(3)]
    dropped = Manifest.load(tmp_path / "out").dropped
    assert dropped["gopher_short_doc"] == 1
    assert sum(dropped.values()) == 4 - foreign_is_kept


def test_hook(prepare, write_jsonl, texts, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "my_filters.py").write_text(
        "def ascii_only(document):\n"
        "    return document.text.isascii(), 'script'\n"
        "def short(document):\n"
        "    return len(document.text) < 45\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    source = write_jsonl("t.jsonl", texts)
    hooks = "filters.hooks=['my_filters:ascii_only','my_filters:short']"
    assert prepare([source], "out", hooks, "tokenizer.vocab_size=260") == 0
    expected = [text for text in texts if text.isascii() and len(text) < 45]
    assert kept(tmp_path / "out") == expected
    dropped = Manifest.load(tmp_path / "out").dropped
    assert dropped["script"] == sum(not text.isascii() for text in texts)
    assert dropped["my_filters:short"] + dropped["script"] + len(expected) == len(texts)
    assert prepare([source], "out2", "filters.hooks=['my_filters:missing']") == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err


def test_a_changed_hook_makes_the_data_anew(prepare, write_jsonl, texts, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = write_jsonl("t.jsonl", texts)
    for end in (" 7", " 18"):
        (tmp_path / "changing.py").write_text(f"def keep(document):\n    return not document.text.endswith({end!r})\n")
        sys.modules.pop("changing", None)  # as in a new process
        assert prepare([source], "out", "filters.hooks=['changing:keep']", "tokenizer.vocab_size=260") == 0
        assert kept(tmp_path / "out") == [text for text in texts if not text.endswith(end)]


def test_exact_copies_across_shards(prepare, write_jsonl, texts, tmp_path: Path) -> None:
    files = [write_jsonl(f"in/{i}.jsonl", part) for i, part in enumerate([texts, [*texts[:30], "new"], texts[5:]])]
    assert prepare(files, "out", "dedup.exact=true", "shard_bytes=1") == 0
    assert sorted(kept(tmp_path / "out")) == sorted([*texts, "new"])
    assert Manifest.load(tmp_path / "out").dropped == {"exact copy": 30 + 55}
    # One file changes: what is a copy changes with it.
    write_jsonl("in/0.jsonl", texts[:1])
    assert prepare(files, "out", "dedup.exact=true", "shard_bytes=1") == 0
    assert sorted(kept(tmp_path / "out")) == sorted([*texts, "new"])
    assert len(list((tmp_path / "out" / "shards").glob("dedup-*"))) == 1


def test_near_copies(prepare, write_jsonl, tmp_path: Path) -> None:
    """One word of 120 differs: 5 of 116 5-grams, similarity 111/121 = 0.92, found with probability 1 - 6e-5 by the
    14 buckets of 8 hashes (the seed of the hashes is fixed). Unrelated texts share no 5-gram."""
    originals = [prose(seed) for seed in range(8)]
    edited = [text.replace(text.split()[60], "changed", 1) for text in originals[:4]]
    files = [write_jsonl(f"in/{i}.jsonl", part) for i, part in enumerate([originals, edited])]
    settings = ("dedup.minhash=true", "dedup.exact=true", "shard_bytes=1")
    assert prepare([*files, write_jsonl("in/2.jsonl", originals[6:])], "out", *settings) == 0
    left = set(kept(tmp_path / "out"))
    assert len(left) == 8
    assert all(len(left & {original, copy}) == 1 for original, copy in zip(originals[:4], edited, strict=True))
    assert left >= set(originals[4:])
    assert Manifest.load(tmp_path / "out").dropped == {"exact copy": 2, "near copy": 4}
