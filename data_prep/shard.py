"""One shard: some input files become one indexed dataset a split. The unit of work and of restart."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from data_prep.inputs import FileRecord, InputFile, unchanged
from data_prep.splits import Losses
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed

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
    dropped: dict[str, int]
    """Documents that filters and dedup left out, by reason."""
    files: dict[str, int]
    """Bytes of each file of the shard, by suffix."""


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Which files make a shard, and where it goes."""

    prefix: Path
    """``<prefix>.train.bin`` and so on."""
    files: tuple[InputFile, ...]
    fingerprint: str
    """Of all settings that decide the tokens, the tokenizer among them."""

    def path(self, suffix: str) -> Path:
        """A file of the shard."""
        return self.prefix.with_name(f"{self.prefix.name}.{suffix}")

    def partial(self, suffix: str) -> Path:
        """The same file while it is incomplete."""
        return self.path(f"{suffix}{_PARTIAL}")

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(file.size for file in self.files)


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


def complete(
    task: ShardTask, files: list[str], splits: dict[str, SplitCount], losses: Losses, dropped: dict[str, int]
) -> None:
    """Give the partial files of a shard their names and record it: it appears complete or not at all."""
    record = ShardRecord(
        fingerprint=task.fingerprint,
        inputs=tuple(map(FileRecord.of, task.files)),
        splits=splits,
        empty_documents=losses.empty_documents,
        defects=losses.defects,
        examples=tuple(losses.examples),
        dropped=dropped,
        files={name: task.partial(name).stat().st_size for name in files},
    )
    task.partial("json").write_text(json.dumps(asdict(record), indent=1))
    for name in [*files, "json"]:  # the record last: it vouches for the others
        task.partial(name).replace(task.path(name))


def _size(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None
