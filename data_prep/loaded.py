"""The tokenizer of a preparation, read once in a process and not once in a shard."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer


def loaded(path: Path) -> Tokenizer:
    """A tokenizer file; the last one stays in memory, with the words that it has met, until the file changes."""
    state = path.stat()
    return _load(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=1)
def _load(path: Path, mtime_ns: int, size: int) -> Tokenizer:
    return load_tokenizer(path)
