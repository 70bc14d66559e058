"""Whole repositories as documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

from data_prep.long.order import dependency_order
from data_prep.long.pack import Packed
from nemotron3_megatron.data.tokenizer import Tokenizer

_BATCH_CHARACTERS = 1_000_000


def repository_documents(files: Mapping[str, str], limit: int, tokenizer: Tokenizer) -> Iterator[Packed]:
    """The files of a repository (path to text) end to end, each under its path, in documents below ``limit`` tokens.

    A document ends where the next file would not fit; a file that is longer than a document is cut.
    """
    room = limit - 1  # the end of document
    parts = (f"==> {path} <==\n{files[path].rstrip()}\n\n" for path in dependency_order(files))
    texts: list[str] = []
    pieces: list[NDArray[np.int64]] = []
    filled = 0
    for text, tokens in _encoded(parts, tokenizer):
        if filled and filled + len(tokens) > room:
            yield Packed(np.concatenate(pieces), "".join(texts))
            texts, pieces, filled = [], [], 0
        for start in range(0, len(tokens) - room, room):
            cut = tokens[start : start + room]
            yield Packed(cut, tokenizer.decode(cut.tolist()))
        if len(tokens) > room:
            tokens = tokens[(len(tokens) - 1) // room * room :]
            text = tokenizer.decode(tokens.tolist())
        texts.append(text)
        pieces.append(tokens)
        filled += len(tokens)
    if pieces:
        yield Packed(np.concatenate(pieces), "".join(texts))


def _encoded(texts: Iterable[str], tokenizer: Tokenizer) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Texts and their ids; not all at once, a repository may be large."""
    waiting: list[str] = []
    size = 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield from zip(waiting, tokenizer.encode_batch(waiting), strict=True)
            waiting, size = [], 0
    yield from zip(waiting, tokenizer.encode_batch(waiting), strict=True)
