"""The files that are written are those of Megatron-Core's own builder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import nemotron3_megatron  # noqa: F401  adapts Megatron-Core to this machine before it is imported
from data_prep.indexed import IndexedWriter, merge, token_dtype

megatron = pytest.importorskip("megatron.core.datasets.indexed_dataset")


@pytest.mark.parametrize("vocab_size", [300, 65_499, 65_500, 131_072])
def test_bytes_are_those_of_megatron(tmp_path: Path, vocab_size: int) -> None:
    rng = np.random.default_rng(vocab_size)
    documents = [rng.integers(0, vocab_size, size) for size in (5, 1, 0, 7000, 3)]
    assert token_dtype(vocab_size) == megatron.DType.optimal_dtype(vocab_size)
    for number, part in enumerate([documents[:2], documents[2:]]):
        writer = IndexedWriter(tmp_path / f"p{number}.bin", tmp_path / f"p{number}.idx", token_dtype(vocab_size))
        writer.add(np.concatenate(part), [len(tokens) for tokens in part])
        writer.finish()
    merge([tmp_path / "p0", tmp_path / "p1"], tmp_path / "ours.bin", tmp_path / "ours.idx")

    builder = megatron.IndexedDatasetBuilder(
        str(tmp_path / "theirs.bin"), dtype=megatron.DType.optimal_dtype(vocab_size)
    )
    for tokens in documents:
        builder.add_document(tokens, [len(tokens)])
    builder.finalize(str(tmp_path / "theirs.idx"))
    for suffix in ("bin", "idx"):
        assert (tmp_path / f"ours.{suffix}").read_bytes() == (tmp_path / f"theirs.{suffix}").read_bytes()


def test_no_document_at_all(tmp_path: Path) -> None:
    for name in ("a", "b"):
        IndexedWriter(tmp_path / f"{name}.bin", tmp_path / f"{name}.idx", token_dtype(300)).finish()
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c.bin", tmp_path / "c.idx")
    assert (tmp_path / "c.idx").read_bytes() == (tmp_path / "a.idx").read_bytes()
