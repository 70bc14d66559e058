"""Shards merged into one dataset a split, and the manifest that says what it is."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data_prep.indexed import merge
from data_prep.inputs import FileRecord, InputFile, unchanged
from data_prep.recipe import PreparationRecipe
from data_prep.shard import ShardRecord, ShardTask, SplitCount, finished
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
    dropped: dict[str, int]
    """Documents that filters and dedup left out, by reason."""
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
    recipe: PreparationRecipe, mark: str, tokenizer: Tokenizer, tokenizer_file: Path, tasks: Sequence[ShardTask]
) -> Manifest:
    """Merge finished shards into ``train`` and, where there is one, ``validation``, and write the manifest.

    Raises:
        UserError: a shard is not finished, or a split that was asked for is empty.
    """
    directory = Path(recipe.output)
    records = [record for task in tasks if (record := finished(task)) is not None]
    if len(records) < len(tasks):
        raise UserError("the input changed while it was read", nearest="run again; unchanged shards are kept")
    splits = {split: _total([record.splits[split] for record in records]) for split in SPLITS}
    _check_splits(recipe, splits["train"].documents, splits["validation"].documents, records)
    present = [split for split in SPLITS if splits[split].documents]
    outputs = [name for split in SPLITS for name in _merge(directory, split, tasks)]
    counts = sum(np.load(task.path("counts.npy")) for task in tasks)
    dropped: Counter[str] = Counter()
    for record in records:
        dropped.update(record.dropped)
    manifest = Manifest(
        recipe=recipe.name,
        fingerprint=mark,
        tokenizer=TokenizerRecord(tokenizer_file.name, tokenizer.fingerprint, tokenizer.vocab_size, tokenizer.eod),
        splits={split: splits[split] for split in present},
        unigram=unigram(*counts) if len(present) == len(SPLITS) else None,
        empty_documents=sum(record.empty_documents for record in records),
        dropped=dict(dropped),
        defects=sum(record.defects for record in records),
        defect_examples=tuple(example for record in records for example in record.examples)[:_EXAMPLES],
        files={name: _output(directory / name) for name in [*outputs, tokenizer_file.name]},
        inputs=tuple(file for record in records for file in record.inputs),
        versions={name: version(name) for name in ("datatrove", "tokenizers")},
    )
    manifest.save(directory)
    return manifest


def _check_splits(recipe: PreparationRecipe, train: int, validation: int, records: Sequence[ShardRecord]) -> None:
    if not train:
        lost = {
            "empty": sum(record.empty_documents for record in records),
            "defective": sum(record.defects for record in records),
            "dropped": sum(sum(record.dropped.values()) for record in records),
            "held out": validation,
        }
        counts = ", ".join(f"{count:,} {name}" for name, count in lost.items())
        examples = [example for record in records for example in record.examples][:1]
        raise UserError("no document is left to train on", why="; ".join([f"of all input were {counts}", *examples]))
    if recipe.validation_fraction and not validation:
        raise UserError(
            f"validation_fraction={recipe.validation_fraction} holds out none of {train} documents",
            nearest="a larger share, more documents, or validation_fraction=0",
        )


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


def _merge(directory: Path, split: Split, tasks: Sequence[ShardTask]) -> list[str]:
    """Merge one split of all shards; the names of its files, none when it is empty."""
    names = [f"{split}.bin", f"{split}.idx", f"{split}.truth.jsonl"]
    partial = [directory / f"{name}.partial" for name in names]
    merge([task.path(split) for task in tasks], partial[0], partial[1])
    with partial[2].open("wb") as stream:
        for task in tasks:
            with task.path(names[2]).open("rb") as source:
                shutil.copyfileobj(source, stream)
    empty = [not partial[0].stat().st_size, not partial[0].stat().st_size, not partial[2].stat().st_size]
    for name, path, left_out in zip(names, partial, empty, strict=True):
        path.replace(directory / name)
        if left_out:
            (directory / name).unlink()
    return [name for name, left_out in zip(names, empty, strict=True) if not left_out]


def _output(path: Path) -> OutputFile:
    with path.open("rb") as stream:
        return OutputFile(path.stat().st_size, hashlib.file_digest(stream, "sha256").hexdigest())
