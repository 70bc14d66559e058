"""Indexed corpora: what is written is read, and damaged files end in one clear message."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.indexed import IndexedTokens

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [], [9, 10, 11, 12, 0]]


@pytest.fixture
def prefix(write_corpus) -> Path:
    return write_corpus("corpus", DOCUMENTS)


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_reads_what_was_written(write_corpus, dtype: type) -> None:
    corpus = IndexedTokens(write_corpus("corpus", DOCUMENTS, dtype), vocab_size=20)
    assert corpus.lengths.tolist() == [4, 2, 0, 5]
    assert corpus.num_tokens == 11
    assert [corpus.read(d, 0, len(tokens)).tolist() for d, tokens in enumerate(DOCUMENTS)] == DOCUMENTS
    assert corpus.read(3, 1, 3).tolist() == [10, 11, 12]
    assert corpus.read(3, 1, 3).dtype == np.int64


def test_documents_of_several_sequences(tmp_path: Path) -> None:
    """Megatron-LM's preprocessing may split a document into sentences; here it is one document again."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(tmp_path / "s.bin"))
    builder.add_document(np.array([1, 2, 3, 4, 0]), [2, 3])
    builder.add_document(np.array([5, 0]), [2])
    builder.finalize(str(tmp_path / "s.idx"))
    corpus = IndexedTokens(tmp_path / "s", vocab_size=10)
    assert corpus.lengths.tolist() == [5, 2]
    assert corpus.read(0, 1, 4).tolist() == [2, 3, 4, 0]
    assert corpus.read(1, 0, 2).tolist() == [5, 0]


def test_programming_errors(prefix: Path) -> None:
    with pytest.raises(IndexError):
        IndexedTokens(prefix, vocab_size=20).read(1, 0, 3)


def test_identity_follows_content_not_place(write_corpus, prefix: Path) -> None:
    identity = IndexedTokens(prefix, vocab_size=20).identity
    assert IndexedTokens(write_corpus("copy", DOCUMENTS), vocab_size=20).identity == identity
    other = write_corpus("other", [[5, 6, 7, 0], [8, 0], [], [9, 10, 11, 13, 0]])
    assert IndexedTokens(other, vocab_size=20).identity != identity


def message(prefix: Path) -> str:
    with pytest.raises(UserError) as caught:
        IndexedTokens(prefix, vocab_size=20)
    return str(caught.value)


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(prefix: Path, suffix: str) -> None:
    Path(f"{prefix}{suffix}").unlink()
    assert f"corpus{suffix} does not exist" in message(prefix)


def test_misspelt_prefix_names_the_nearest(prefix: Path) -> None:
    assert str(prefix) in message(prefix.with_name("corpsu")).splitlines()[-1]
    assert f"{prefix} (the path without .bin)" in message(prefix.with_suffix(".bin"))


@pytest.mark.parametrize("bytes_left", [0, 10, 43])
def test_truncated_bin(prefix: Path, bytes_left: int) -> None:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:bytes_left])
    text = message(prefix)
    assert f"corpus.bin has {bytes_left} bytes" in text
    assert "describes 44" in text


def test_bin_longer_than_its_index(prefix: Path) -> None:
    with open(f"{prefix}.bin", "ab") as stream:
        stream.write(b"\0" * 4)
    assert "has 48 bytes" in message(prefix)


def edited(prefix: Path, offset: int, data: bytes) -> str:
    path = Path(f"{prefix}.idx")
    content = bytearray(path.read_bytes())
    content[offset : offset + len(data)] = data
    path.write_bytes(content)
    return message(prefix)


@pytest.mark.parametrize(
    ("offset", "data", "expected"),
    [
        (0, b"PK\x03\x04", "does not begin like"),
        (9, struct.pack("<Q", 3), "format version 3"),
        (17, b"\x07", "element type code 7"),
        (17, b"\x63", "element type code 99"),
        (18, struct.pack("<Q", 2**60), "its header describes"),
        (34, struct.pack("<i", -4), "contradict each other"),
        (34 + 16, struct.pack("<q", 4), "contradict each other"),
        (34 + 48 + 8, struct.pack("<q", 3), "not in order"),
        (34 + 48 + 32, struct.pack("<q", 9), "not in order"),
    ],
)
def test_corrupt_index(prefix: Path, offset: int, data: bytes, expected: str) -> None:
    text = edited(prefix, offset, data)
    assert "corpus.idx" in text
    assert expected in text


@pytest.mark.parametrize("bytes_left", [0, 5, 33, 100])
def test_truncated_index(prefix: Path, bytes_left: int) -> None:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:bytes_left])
    assert "corpus.idx is not a usable index" in message(prefix)


def test_index_of_another_corpus(write_corpus, prefix: Path) -> None:
    other = write_corpus("other", [[1, 2, 0]])
    Path(f"{prefix}.idx").write_bytes(Path(f"{other}.idx").read_bytes())
    assert "another corpus" in message(prefix)


def test_empty_corpus(write_corpus) -> None:
    assert "is empty" in message(write_corpus("empty", [[]]))


def test_token_outside_the_vocabulary_names_the_document(prefix: Path) -> None:
    corpus = IndexedTokens(prefix, vocab_size=12)
    corpus.read(0, 0, 4)
    with pytest.raises(UserError, match=r"token id 12 \(document 3 of 4\)"):
        corpus.read(3, 0, 5)
