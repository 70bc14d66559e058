"""Whole repositories as documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from data_prep.long.order import dependency_order
from data_prep.long.pack import Packed
from nemotron3_megatron.data.tokenizer import Tokenizer


def repository_documents(files: Mapping[str, str], limit: int, tokenizer: Tokenizer) -> Iterator[Packed]:
    """The files of a repository (path to text) end to end, each under its path, in documents below ``limit`` tokens.

    A document ends where the next file would not fit; a file that is longer than a document is cut.
    """
    room = limit - 1  # the end of document
    parts = [f"==> {path} <==\n{files[path].rstrip()}\n\n" for path in dependency_order(files)]
    texts: list[str] = []
    pieces: list[np.ndarray] = []
    filled = 0
    for text, ids in zip(parts, tokenizer.encode_batch(parts), strict=True):
        tokens = np.asarray(ids, dtype=np.int64)
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
