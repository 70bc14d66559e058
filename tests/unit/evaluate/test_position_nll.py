"""NLL by position: windows and buckets against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.evaluate.position_nll import buckets, draw_position_nll, long_windows


@pytest.fixture
def corpus(tmp_path: Path) -> IndexedTokens:
    builder = IndexedDatasetBuilder(f"{tmp_path}/c.bin", dtype=np.uint16)
    for first, length in ((0, 33), (100, 10), (200, 25), (300, 16)):
        builder.add_document(np.arange(first, first + length), [length])
    builder.finalize(f"{tmp_path}/c.idx")
    return IndexedTokens(tmp_path / "c", vocab_size=1000)


def test_windows_lie_in_one_document_and_begin_with_it(corpus: IndexedTokens) -> None:
    found = [window.tolist() for window in long_windows(corpus, 16)]
    # 33 tokens hold two windows of 16 and the token after the last; 16 and 10 tokens hold none.
    assert found == [list(range(0, 17)), list(range(16, 33)), list(range(200, 217))]
    with pytest.raises(UserError, match="the longest document"):
        next(long_windows(corpus, 33))


def test_buckets_are_means_over_positions_and_windows(tmp_path: Path) -> None:
    losses = np.random.default_rng(0).random((5, 300))
    found = buckets(losses)
    assert [(each.first, each.end) for each in found] == [(0, 64), (64, 128), (128, 256), (256, 300)]
    for each in found:
        part = losses[:, each.first : each.end]
        assert each.nll == pytest.approx(part.mean())
        assert each.error == pytest.approx(np.std(part.mean(axis=1), ddof=1) / np.sqrt(5))
        assert each.cumulative == pytest.approx(losses[:, : each.end].mean())
    draw_position_nll(tmp_path / "x.png", losses, found)
    assert (tmp_path / "x.png").stat().st_size > 1000
