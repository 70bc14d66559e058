"""Shards merged into one dataset a split, and the manifest that says what it is."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.inputs import FileRecord, InputFile, unchanged
from data_prep.megatron import indexed_dataset
from data_prep.shard import ShardRecord, ShardTask, SplitCount
from data_prep.splits import SPLITS, Split
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.data.tokenizer import Tokenizer

MANIFEST = "manifest.json"
_EXAMPLES = 20


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A file of the result."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TokenizerRecord:
    """The tokenizer that made the tokens."""

    file: str
    fingerprint: str
    vocab_size: int
    eod_token: int


@dataclass(frozen=True, slots=True)
class Unigram:
    """How well word frequencies alone predict the validation split, in nats per token (EODs included).

    A model that has learned anything beyond them has a lower loss.
    """

    validation_cross_entropy: float
    """Under the training split's frequencies, one added to each count (add-one smoothing)."""
    validation_entropy: float
    """Under its own frequencies: the best any fixed distribution can do."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a prepared directory holds and what it was made of."""

    recipe: str
    fingerprint: str
    tokenizer: TokenizerRecord
    splits: dict[str, SplitCount]
    unigram: Unigram | None
    empty_documents: int
    defects: int
    defect_examples: tuple[str, ...]
    files: dict[str, OutputFile]
    inputs: tuple[FileRecord, ...]
    versions: dict[str, str]

    def save(self, directory: Path) -> None:
        """Write ``manifest.json`` in one step."""
        partial = directory / f"{MANIFEST}.partial"
        partial.write_text(json.dumps(asdict(self), indent=1) + "\n")
        partial.replace(directory / MANIFEST)

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Read ``manifest.json``.

        Raises:
            UserError: it is missing or not one of ours.
        """
        path = directory / MANIFEST
        try:
            manifest = typed(cls, json.loads(path.read_text()), "", lambda _: str(path))
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read", why=str(error), nearest="prepare the data again") from error
        assert isinstance(manifest, cls)
        return manifest

    def holds(self, directory: Path, fingerprint: str, files: Sequence[InputFile]) -> bool:
        """True when the directory is complete and still what these settings and inputs make."""
        complete = all(
            (directory / name).is_file() and (directory / name).stat().st_size == file.size
            for name, file in self.files.items()
        )
        return complete and self.fingerprint == fingerprint and unchanged(self.inputs, files)


def finish(
    directory: Path,
    *,
    recipe: str,
    fingerprint: str,
    tokenizer: Tokenizer,
    tokenizer_file: Path,
    tasks: Sequence[ShardTask],
    records: Sequence[ShardRecord],
) -> Manifest:
    """Merge finished shards into ``train`` and, where there is one, ``validation``, and write the manifest."""
    splits = {split: _total([record.splits[split] for record in records]) for split in SPLITS}
    present = [split for split in SPLITS if splits[split].documents]
    for split in present:
        _merge(directory / split, [task for task, record in zip(tasks, records, strict=True)
                                   if record.splits[split].documents], split)  # fmt: skip
    for split in set(SPLITS) - set(present):
        for suffix in (".bin", ".idx"):
            (directory / split).with_suffix(suffix).unlink(missing_ok=True)
    counts = sum(np.load(task.path("counts.npy")) for task in tasks)
    outputs = [f"{split}{suffix}" for split in present for suffix in (".bin", ".idx")]
    manifest = Manifest(
        recipe=recipe,
        fingerprint=fingerprint,
        tokenizer=TokenizerRecord(tokenizer_file.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod),
        splits={split: splits[split] for split in present},
        unigram=unigram(*counts) if len(present) == len(SPLITS) else None,
        empty_documents=sum(record.empty_documents for record in records),
        defects=sum(record.defects for record in records),
        defect_examples=tuple(example for record in records for example in record.examples)[:_EXAMPLES],
        files={name: _output(directory / name) for name in [*outputs, tokenizer_file.name]},
        inputs=tuple(file for record in records for file in record.inputs),
        versions={name: version(name) for name in ("megatron-core", "tokenizers")},
    )
    manifest.save(directory)
    return manifest


def unigram(train: NDArray[np.int64], validation: NDArray[np.int64]) -> Unigram:
    """Entropies from token counts, each (vocab_size,) int64; both splits have tokens."""
    share = validation / validation.sum()
    smoothed = (train + 1) / (train.sum() + len(train))
    seen = share > 0
    return Unigram(
        validation_cross_entropy=float(-(share * np.log(smoothed)).sum()),
        validation_entropy=float(-(share[seen] * np.log(share[seen])).sum()),
    )


def _total(counts: Sequence[SplitCount]) -> SplitCount:
    return SplitCount(
        documents=sum(count.documents for count in counts),
        tokens=sum(count.tokens for count in counts),
        text_bytes=sum(count.text_bytes for count in counts),
    )


def _merge(prefix: Path, tasks: Sequence[ShardTask], split: Split) -> None:
    megatron = indexed_dataset()
    partial = {suffix: prefix.with_suffix(f"{suffix}.partial") for suffix in (".bin", ".idx")}
    dtype = megatron.IndexedDataset(str(tasks[0].path(split))).index.dtype
    builder = megatron.IndexedDatasetBuilder(str(partial[".bin"]), dtype=dtype)
    for task in tasks:
        builder.add_index(str(task.path(split)))
    builder.finalize(str(partial[".idx"]))
    for suffix, path in partial.items():
        path.replace(prefix.with_suffix(suffix))


def _output(path: Path) -> OutputFile:
    with path.open("rb") as stream:
        return OutputFile(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
