"""Documents of a tokenised corpus on disk: a ``.bin``/``.idx`` pair in Megatron-Core's IndexedDataset format.

The pair is checked against itself before Megatron-Core maps it into memory, so that an interrupted copy or a
foreign file ends in one clear message and not in wrong tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import struct
from functools import cached_property
from pathlib import Path

import numpy as np
from megatron.core.datasets.indexed_dataset import DType, IndexedDataset
from numpy.typing import NDArray

from nemotron3_megatron.config.errors import UserError

# Layout of an index: magic, version, element type code, number of sequences, number of document indices.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_PREPARE = "prepare the data again, for example with `python -m data_prep recipe=NAME`, or copy it again"

_SAMPLED_BLOCKS = 16
_BLOCK_BYTES = 4096


class IndexedTokens:
    """Random access to the documents of one corpus, mapped into memory and read only.

    Attributes:
        prefix: path without ``.bin``/``.idx``.
        lengths: (documents,) int64, tokens in each document.
        num_tokens: tokens in all.
    """

    def __init__(self, prefix: str | Path, *, vocab_size: int) -> None:
        """Check and map the pair.

        Args:
            prefix: path without ``.bin``/``.idx``.
            vocab_size: token ids must be below it; checked when tokens are read.

        Raises:
            UserError: a file is missing, unreadable, foreign, or the two disagree.
        """
        self.prefix = Path(prefix)
        self._vocab_size = vocab_size
        check_files(self.prefix)
        self._dataset = IndexedDataset(str(self.prefix))
        self._first_sequence: NDArray[np.int64] = np.array(self._dataset.document_indices)
        ends = np.concatenate(([0], np.cumsum(self._dataset.sequence_lengths, dtype=np.int64)))
        self.lengths: NDArray[np.int64] = np.diff(ends[self._first_sequence])
        self.num_tokens = int(ends[-1])

    def read(self, document: int, offset: int, length: int) -> NDArray[np.int64]:
        """Tokens ``[offset, offset + length)`` of a document, (length,) int64, a copy.

        Raises:
            UserError: a token id is not below the vocabulary size.
            IndexError: the range is outside the document.
        """
        if offset < 0 or length < 0 or offset + length > self.lengths[document]:
            raise IndexError(f"document {document} has no tokens [{offset}, {offset + length})")
        raw = self._dataset.get(int(self._first_sequence[document]), offset, length) if length else ()
        tokens = np.array(raw, dtype=np.int64)
        if length and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            worst = tokens.min() if tokens.min() < 0 else tokens.max()
            raise UserError(
                f"{self.prefix}.bin holds the token id {worst}",
                where=f"document {document} of {len(self.lengths)}",
                why=f"the model's vocabulary has {self._vocab_size} entries",
                nearest="the tokenizer that made the data must be the model's; set model.vocab_size to its size",
            )
        return tokens

    @cached_property
    def identity(self) -> str:
        """What the content is, wherever it lies: token count and a hash.

        The hash covers the whole index and 16 evenly spaced blocks of 4 KiB of the tokens, so that it takes
        seconds and not hours on a large corpus.
        """
        digest = hashlib.sha256()
        with open(f"{self.prefix}.idx", "rb") as index:
            while chunk := index.read(1 << 22):
                digest.update(chunk)
        size = os.path.getsize(f"{self.prefix}.bin")
        with open(f"{self.prefix}.bin", "rb") as tokens:
            for block in range(_SAMPLED_BLOCKS):
                tokens.seek(max(0, size - _BLOCK_BYTES) * block // (_SAMPLED_BLOCKS - 1))
                digest.update(tokens.read(_BLOCK_BYTES))
        return f"{self.num_tokens} tokens, sha256 {digest.hexdigest()[:32]}"


def check_files(prefix: Path) -> None:
    """Raise unless ``prefix.bin`` and ``prefix.idx`` are a readable pair that agrees with itself.

    Raises:
        UserError: naming the file, what is wrong with it and what to do.
    """
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    for path in (index, data):
        if not path.is_file():
            raise UserError(f"{path} does not exist", why="a source is a .bin/.idx pair", nearest=_nearest(prefix))
    try:
        content = np.memmap(index, dtype=np.uint8, mode="r") if index.stat().st_size else np.empty(0, np.uint8)
        data_size = data.stat().st_size
        with data.open("rb"):
            pass
    except OSError as error:
        raise UserError(f"{error.filename or prefix} cannot be read", why=error.strerror or str(error)) from error
    described = _described_bytes(index, content)
    if described != data_size:
        raise UserError(
            f"{data} has {data_size:,} bytes",
            why=f"its index {index.name} describes {described:,}: one of the two is incomplete or of another corpus",
            nearest=_PREPARE,
        )
    if not data_size:
        raise UserError(f"{data} is empty", why="a source needs at least one document", nearest=_PREPARE)


def _described_bytes(path: Path, content: NDArray[np.uint8]) -> int:
    """Size in bytes that the ``.bin`` of this index must have."""

    def corrupt(why: str) -> UserError:
        return UserError(f"{path} is not a usable index", why=why, nearest=_PREPARE)

    if content.size < _HEADER.size or content[: len(_MAGIC)].tobytes() != _MAGIC:
        raise corrupt("it does not begin like one of Megatron-Core's indexed datasets")
    _, version, code, sequences, boundaries = _HEADER.unpack(content[: _HEADER.size].tobytes())
    if version != 1:
        raise corrupt(f"it has format version {version}, only version 1 is known")
    if code not in {kind.value for kind in DType} or not np.issubdtype(DType.dtype_from_code(code), np.integer):
        raise corrupt(f"element type code {code} is not an integer type")
    expected = _HEADER.size + 12 * sequences + 8 * boundaries
    if content.size != expected or not boundaries:
        raise corrupt(f"it has {content.size:,} bytes, its header describes {expected:,}")

    lengths = np.frombuffer(content, "<i4", sequences, _HEADER.size)
    pointers = np.frombuffer(content, "<i8", sequences, _HEADER.size + 4 * sequences)
    documents = np.frombuffer(content, "<i8", boundaries, _HEADER.size + 12 * sequences)
    ends = np.cumsum(lengths, dtype=np.int64) * DType.size(code)
    if (lengths < 0).any() or not np.array_equal(pointers[1:], ends[:-1]) or pointers[:1].any():
        raise corrupt("its sequence lengths and positions contradict each other")
    if documents[0] != 0 or documents[-1] != sequences or (np.diff(documents) < 0).any():
        raise corrupt("its document boundaries are not in order")
    return int(ends[-1]) if sequences else 0


def _nearest(prefix: Path) -> str:
    """What the user may have meant by a prefix that does not exist."""
    if prefix.suffix in (".bin", ".idx"):
        return f"{prefix.with_suffix('')} (the path without {prefix.suffix})"
    present = [str(path.with_suffix("")) for path in sorted(prefix.parent.glob("*.idx"))]
    close = difflib.get_close_matches(str(prefix), present, n=1, cutoff=0.0)
    return close[0] if close else _PREPARE
