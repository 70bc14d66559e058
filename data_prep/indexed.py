"""Writing Megatron-Core's indexed datasets (``.bin``/``.idx``), one sequence a document.

Written here and not with its ``IndexedDatasetBuilder``, whose import costs every worker seconds and half a gigabyte.
The bytes are the same; a test compares them.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# megatron/core/datasets/indexed_dataset.py: _INDEX_HEADER, version 1, then the code of DType.
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES = {"uint16": 8, "int32": 4}
_UINT16_VOCABULARY = 65500
"""DType.optimal_dtype: smaller vocabularies are written as uint16."""
_COPY_BYTES = 1 << 24


def token_dtype(vocab_size: int) -> np.dtype[np.integer]:
    """Element type of the tokens of a vocabulary, the one Megatron-Core chooses."""
    return np.dtype(np.uint16 if vocab_size < _UINT16_VOCABULARY else np.int32)


class IndexedWriter:
    """Appends documents to ``data`` and at the end describes them in ``index``."""

    def __init__(self, data: Path, index: Path, dtype: np.dtype[np.integer]) -> None:
        self._stream = data.open("wb")
        self._index = index
        self._dtype = dtype
        self._lengths: list[NDArray[np.int32]] = []

    def add(self, tokens: NDArray[np.integer], lengths: Sequence[int]) -> None:
        """Append documents: their tokens end to end, (tokens,), and the number of tokens in each."""
        self._stream.write(np.ascontiguousarray(tokens, dtype=self._dtype))
        self._lengths.append(np.asarray(lengths, dtype=np.int32))

    def finish(self) -> None:
        """Close the data and write the index."""
        self._stream.close()
        write_index(self._index, np.concatenate([*self._lengths, np.empty(0, np.int32)]), self._dtype)


def write_index(path: Path, lengths: NDArray[np.int32], dtype: np.dtype[np.integer]) -> None:
    """Write the ``.idx`` of documents of these lengths, (documents,) int32."""
    ends = np.cumsum(lengths, dtype=np.int64) * dtype.itemsize
    pointers = np.concatenate(([0], ends[:-1])).astype("<i8") if len(lengths) else np.empty(0, "<i8")
    with path.open("wb") as stream:
        stream.write(_HEADER.pack(_MAGIC, 1, _CODES[dtype.name], len(lengths), len(lengths) + 1))
        stream.write(lengths.astype("<i4").tobytes())
        stream.write(pointers.tobytes())
        stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())


def read_lengths(index: Path) -> tuple[NDArray[np.int32], np.dtype[np.integer]]:
    """Lengths of the documents of an ``.idx`` that this module wrote, (documents,) int32, and the element type."""
    content = index.read_bytes()
    _, _, code, documents, _ = _HEADER.unpack_from(content)
    names = {value: name for name, value in _CODES.items()}
    return np.frombuffer(content, "<i4", documents, _HEADER.size), np.dtype(names[code])


def merge(parts: Sequence[Path], data: Path, index: Path) -> None:
    """Write several datasets, given by their paths without suffix and each with the same element type, as one."""
    lengths, dtypes = zip(*(read_lengths(part.with_name(f"{part.name}.idx")) for part in parts), strict=True)
    with data.open("wb") as stream:
        for part in parts:
            with part.with_name(f"{part.name}.bin").open("rb") as source:
                shutil.copyfileobj(source, stream, _COPY_BYTES)
    write_index(index, np.concatenate(lengths), dtypes[0])
