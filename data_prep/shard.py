"""One shard: some input files become one indexed dataset a split. The unit of work and of restart."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.inputs import FileRecord, InputFile, unchanged
from data_prep.megatron import indexed_dataset
from data_prep.recipe import Policy
from data_prep.splits import SPLITS, Losses, Split, documents, split_of
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer

_BATCH_BYTES = 1_000_000
_PARTIAL = ".partial"


@dataclass(frozen=True, slots=True)
class SplitCount:
    """Size of one split."""

    documents: int
    tokens: int
    text_bytes: int


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """A finished shard, as saved beside its tokens."""

    fingerprint: str
    inputs: tuple[FileRecord, ...]
    splits: dict[str, SplitCount]
    empty_documents: int
    defects: int
    examples: tuple[str, ...]
    files: dict[str, int]
    """Bytes of each file of the shard, by suffix."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker needs to make a shard."""

    prefix: Path
    """``<prefix>.train.bin`` and so on."""
    files: tuple[InputFile, ...]
    text_field: str
    on_error: Policy
    validation_fraction: float
    tokenizer: Path
    fingerprint: str
    """Of all settings that decide the tokens, the tokenizer among them."""

    def path(self, suffix: str) -> Path:
        """A file of the shard."""
        return self.prefix.with_name(f"{self.prefix.name}.{suffix}")


def finished(task: ShardTask) -> ShardRecord | None:
    """The record of a shard that is finished and still holds for its inputs and settings; else None."""
    try:
        record = typed(ShardRecord, json.loads(task.path("json").read_text()), "", lambda _: None)
    except (OSError, ValueError, UserError):
        return None
    assert isinstance(record, ShardRecord)
    if record.fingerprint != task.fingerprint or not unchanged(record.inputs, task.files):
        return None
    return record if all(_size(task.path(suffix)) == size for suffix, size in record.files.items()) else None


def make_shard(task: ShardTask, advance: Callable[[int], None]) -> ShardRecord:
    """Tokenise the files of a shard. Its files appear under their names only when all of them are complete.

    Args:
        advance: called with the bytes of input used up since the last call.

    Raises:
        UserError: input that cannot be read, when the policy is ``error``.
    """
    tokenizer = load_tokenizer(task.tokenizer)
    losses = Losses()
    writers = {split: _Writer(task, split, tokenizer) for split in SPLITS}
    for file in task.files:
        position = 0
        for document in documents(file, task.text_field, task.on_error, losses):
            writers[split_of(document.text, task.validation_fraction)].add(document.text)
            advance(document.position - position)
            position = document.position
        advance(file.size - position)
    counts = np.stack([writers[split].finish() for split in SPLITS])
    with task.path(f"counts.npy{_PARTIAL}").open("wb") as stream:
        np.save(stream, counts)

    names = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx")] + ["counts.npy"]
    record = ShardRecord(
        fingerprint=task.fingerprint,
        inputs=tuple(map(FileRecord.of, task.files)),
        splits={split: writers[split].size() for split in SPLITS},
        empty_documents=losses.empty_documents,
        defects=losses.defects,
        examples=tuple(losses.examples),
        files={name: task.path(f"{name}{_PARTIAL}").stat().st_size for name in names},
    )
    task.path(f"json{_PARTIAL}").write_text(json.dumps(asdict(record), indent=1))
    for name in [*names, "json"]:  # the record last: it vouches for the others
        task.path(f"{name}{_PARTIAL}").replace(task.path(name))
    return record


class _Writer:
    """Collects the documents of one split, tokenises them in batches and writes them down."""

    def __init__(self, task: ShardTask, split: Split, tokenizer: Tokenizer) -> None:
        megatron = indexed_dataset()
        self._index = task.path(f"{split}.idx{_PARTIAL}")
        self._builder = megatron.IndexedDatasetBuilder(
            str(task.path(f"{split}.bin{_PARTIAL}")), dtype=megatron.DType.optimal_dtype(tokenizer.vocab_size)
        )
        self._tokenizer = tokenizer
        self._counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._waiting: list[str] = []
        self._waiting_bytes = 0
        self._documents = 0
        self._text_bytes = 0

    def add(self, text: bytes) -> None:
        """Take one document."""
        self._waiting.append(text.decode())
        self._waiting_bytes += len(text)
        if self._waiting_bytes >= _BATCH_BYTES:
            self._write()

    def finish(self) -> NDArray[np.int64]:
        """Write the index; how often each token occurs, (vocab_size,) int64."""
        self._write()
        self._builder.finalize(str(self._index))
        return self._counts

    def size(self) -> SplitCount:
        """What was written."""
        return SplitCount(self._documents, int(self._counts.sum()), self._text_bytes)

    def _write(self) -> None:
        for ids in self._tokenizer.encode_batch(self._waiting):
            tokens = np.array([*ids, self._tokenizer.eod], dtype=np.int64)
            self._builder.add_document(tokens, [len(tokens)])
            self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._documents += len(self._waiting)
        self._text_bytes += self._waiting_bytes
        self._waiting, self._waiting_bytes = [], 0


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
