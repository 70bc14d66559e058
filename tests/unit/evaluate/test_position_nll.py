"""NLL by position: windows and buckets against plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.evaluate.position_nll import buckets, context_of, draw_position_nll, long_windows, pieces


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


def test_pieces_have_every_target_once(corpus: IndexedTokens) -> None:
    window = next(long_windows(corpus, 32))
    found = pieces(window, 8)
    assert found.shape == (4, 9)
    assert found[:, 1:].flatten().tolist() == window[1:].tolist()
    assert found[:, :-1].flatten().tolist() == window[:-1].tolist()
    assert pieces(window, 32).tolist() == [window.tolist()]


def test_contexts_compare_window_with_window(tmp_path: Path) -> None:
    """Windows differ by nats, each loses 0.1 or 0.3 more with less context: 0.2 above, whatever the windows' means."""
    whole = np.repeat([[1.0], [5.0]], 64, axis=1)
    limited = whole + np.array([[0.1], [0.3]])
    found = context_of(16, limited, whole)
    assert (found.tokens, found.nll) == (16, pytest.approx(3.2))
    assert (found.above, found.error) == (pytest.approx(0.2), pytest.approx(0.1))  # sqrt(2) * 0.1 / sqrt(2)
    draw_position_nll(tmp_path / "x.png", whole, buckets(whole), [found])
    assert (tmp_path / "x.png").stat().st_size > 1000
