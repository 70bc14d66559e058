"""Windows of a source: every token of an epoch once, epochs reshuffled, random access."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.data.source import Source


def open_source(prefix, seed: int = 1, document_end: int | None = 0) -> Source:
    return Source("text", IndexedTokens(prefix, vocab_size=100_000), seed=seed, document_end=document_end)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=30),
    seq_length=st.integers(1, 16),
    epoch=st.integers(0, 3),
)
def test_windows_cover_an_epoch_exactly_once(write_corpus, numbered, lengths, seq_length, epoch) -> None:
    """The windows tile the epoch's line: inputs once each, overlap of one, at most seq_length tokens dropped."""
    if sum(lengths) <= seq_length:
        return
    documents = numbered(lengths)
    source = open_source(write_corpus("corpus", documents))
    count = source.windows_per_epoch(seq_length)
    windows = [source.sample(seq_length, epoch * count + i).tolist() for i in range(count)]
    assert all(len(window) == seq_length + 1 for window in windows)

    seen = Counter(token for window in windows for token in window[:-1])
    expected = Counter(token for document in documents for token in document)
    assert not seen - expected
    assert (expected - seen).total() == sum(lengths) - count * seq_length
    assert 1 <= sum(lengths) - count * seq_length <= seq_length

    # Inside every window, documents are whole: after a token comes the next of its document.
    following = {a: b for document in documents for a, b in pairwise(document) if a}
    for window in windows:
        assert all(following[a] == b for a, b in pairwise(window) if a in following)


def test_windows_overlap_by_one_token(write_corpus, numbered) -> None:
    """The last token of a window is the first of another, so every token but the line's first is a target once."""
    source = open_source(write_corpus("corpus", numbered([33])))
    windows = [source.sample(8, i).tolist() for i in range(4)]
    assert sorted(window[0] for window in windows) == [1, 9, 17, 25]
    assert sorted(window[-1] for window in windows) == [0, 9, 17, 25]


def test_epochs_differ_in_both_orders(write_corpus, numbered) -> None:
    source = open_source(write_corpus("corpus", numbered([5] * 40)))
    count = source.windows_per_epoch(10)
    epochs = [[tuple(source.sample(10, e * count + i)) for i in range(count)] for e in range(2)]
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])


def test_is_a_pure_function_of_content_seed_and_index(write_corpus, numbered) -> None:
    documents = numbered([7, 3, 11, 2, 30, 5])
    one, other = open_source(write_corpus("a", documents)), open_source(write_corpus("b", documents))
    for index in [40, 3, 0, 17, 3, 99, 12]:
        assert one.sample(8, index).tolist() == other.sample(8, index).tolist()
    reseeded = open_source(write_corpus("c", documents), seed=2)
    assert any(one.sample(8, i).tolist() != reseeded.sample(8, i).tolist() for i in range(6))


def test_empty_documents_are_passed_over(write_corpus) -> None:
    source = open_source(write_corpus("corpus", [[], [1, 0], [], [], [2, 3, 0], []]))
    windows = [source.sample(2, i).tolist() for i in range(2)]
    assert Counter(token for window in windows for token in window[:2]) <= Counter([1, 0, 2, 3, 0])


def test_corpus_shorter_than_a_window(write_corpus) -> None:
    source = open_source(write_corpus("corpus", [[1, 2, 0]]))
    assert source.sample(2, 0).tolist() == [1, 2, 0]
    with pytest.raises(UserError, match=r"seq_length=3 needs 4"):
        source.sample(3, 0)


def test_document_without_its_end_is_named(write_corpus) -> None:
    prefix = write_corpus("corpus", [[1, 2, 0], [3, 4, 5, 6]])
    with pytest.raises(UserError, match=r"document 1 of source 'text' .* ends with token 6"):
        open_source(prefix).sample(6, 0)
    assert sorted(open_source(prefix, document_end=None).sample(6, 0).tolist()) == [0, 1, 2, 3, 4, 5, 6]
