"""A source: one indexed corpus seen as an endless stream of windows with random access.

Each epoch lays the documents end to end in an order of its own, cuts this line into windows of ``seq_length + 1``
tokens that begin ``seq_length`` apart, and visits the windows in an order of their own. Both orders are keyed
permutations, so window ``index`` is a pure function of (content, seed, seq_length, index): nothing is replayed to
resume. The last, incomplete window of an epoch is dropped: at most ``seq_length`` tokens, others in each epoch.

Cost: 16 bytes a document for the epoch at hand, in each process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import SourceConfig
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.data.permutation import Permutation

# The epoch being read and, around its end, the next one.
_EPOCHS_IN_MEMORY = 2


@dataclass(frozen=True, slots=True)
class _Line:
    """The documents of one epoch, laid end to end."""

    documents: NDArray[np.int64]
    """(documents,) document numbers in reading order."""
    ends: NDArray[np.int64]
    """(documents,) position after each document's last token."""


class Source:
    """An endless, shuffled stream of windows from one corpus."""

    def __init__(
        self, name: str, corpus: IndexedTokens, *, seed: int, document_end: int | None, isolate_documents: bool = True
    ) -> None:
        """Name the source.

        Args:
            name: its name in the recipe, used in messages.
            corpus: where the tokens are.
            seed: of both orders.
            document_end: the token every document must end with; None: not checked.
            isolate_documents: whether documents in one of its windows see each other.
        """
        self.name = name
        self.isolate_documents = isolate_documents
        self.num_tokens = corpus.num_tokens
        self.identity = corpus.identity
        self._corpus = corpus
        self._seed = seed
        self._document_end = document_end
        self._line = lru_cache(maxsize=_EPOCHS_IN_MEMORY)(self._lay_out)

    def windows_per_epoch(self, seq_length: int) -> int:
        """Windows of this length in one pass over the corpus.

        Raises:
            UserError: the corpus is shorter than one window.
        """
        windows = (self._corpus.num_tokens - 1) // seq_length
        if windows < 1:
            raise UserError(
                f"source {self.name!r} ({self._corpus.prefix}) has {self._corpus.num_tokens} tokens",
                why=f"a window of seq_length={seq_length} needs {seq_length + 1}",
                nearest=f"seq_length={self._corpus.num_tokens - 1}, or more text",
            )
        return windows

    def sample(self, seq_length: int, index: int) -> NDArray[np.int64]:
        """Window ``index`` (0, 1, ... without end) of the stream: (seq_length + 1,) int64 token ids.

        Raises:
            UserError: the corpus is too short, holds an id outside the vocabulary, or a document without its end.
        """
        windows = self.windows_per_epoch(seq_length)
        epoch, turn = divmod(index, windows)
        order = Permutation(windows, self._seed, self.identity, epoch, "windows", seq_length)
        return self._read(self._line(epoch), order[turn] * seq_length, seq_length + 1)

    def _lay_out(self, epoch: int) -> _Line:
        order = Permutation(len(self._corpus.lengths), self._seed, self.identity, epoch, "documents").all()
        return _Line(order, np.cumsum(self._corpus.lengths[order]))

    def _read(self, line: _Line, start: int, length: int) -> NDArray[np.int64]:
        """Tokens ``[start, start + length)`` of an epoch's line."""
        window = np.empty(length, dtype=np.int64)
        filled = 0
        place = int(np.searchsorted(line.ends, start, side="right"))
        while filled < length:
            document = int(line.documents[place])
            size = int(self._corpus.lengths[document])
            offset = start + filled - (int(line.ends[place]) - size)
            count = min(size - offset, length - filled)
            tokens = self._corpus.read(document, offset, count)
            if offset + count == size and count:
                self._check_end(document, int(tokens[-1]))
            window[filled : filled + count] = tokens
            filled += count
            place += 1
        return window

    def _check_end(self, document: int, last: int) -> None:
        if self._document_end is not None and last != self._document_end:
            raise UserError(
                f"document {document} of source {self.name!r} ({self._corpus.prefix}) ends with token {last}",
                why=f"documents are isolated by their last token, data.eod_token={self._document_end}",
                nearest="the eod_token of the data's manifest.json, or data.isolate_documents=false",
            )


def open_sources(
    configs: Mapping[str, SourceConfig], *, seed: int, vocab_size: int, eod_token: int, isolate_documents: bool
) -> dict[str, Source]:
    """Open every source of a blend, by name.

    Raises:
        UserError: see IndexedTokens.
    """
    sources = {}
    for name, config in configs.items():
        isolated = isolate_documents and config.isolate_documents is not False
        sources[name] = Source(
            name,
            IndexedTokens(config.path, vocab_size=vocab_size),
            seed=seed,
            document_end=eod_token if isolated else None,
            isolate_documents=isolated,
        )
    return sources
