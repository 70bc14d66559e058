"""The first and the last step of the pipeline that makes shards; between them filters, dedup and packing."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from numpy.typing import NDArray

from data_prep.filters import dropped
from data_prep.indexed import IndexedWriter, token_dtype
from data_prep.loaded import loaded
from data_prep.progress import Progress
from data_prep.readers import Keys
from data_prep.recipe import Policy, PreparationRecipe
from data_prep.shard import ShardTask, SplitCount, complete
from data_prep.splits import SPLITS, Losses, Split, documents, side
from nemotron3_megatron.data.tokenizer import Tokenizer

_BATCH_BYTES = 1_000_000
TRUTH = "truth.jsonl"


class ReadShard(PipelineStep):  # type: ignore[misc]  # datatrove is not typed
    """Yields the documents of the input files of shard ``rank``; ``Document.id`` is the place they come from.

    Attributes:
        losses: what the last shard read has lost.
    """

    type = "READER"
    name = "input files"

    def __init__(self, tasks: Sequence[ShardTask], keys: Keys, on_error: Policy, progress: Path) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.keys = keys
        self.on_error = on_error
        self.progress = progress
        self.losses = Losses()

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """The documents; ``data`` must be None.

        Raises:
            UserError: input that cannot be read, when the policy is ``stop``.
        """
        assert data is None, "nothing comes before the reader"
        self.losses = Losses()
        progress = Progress(self.progress / f"{rank:05d}.bytes")
        for file in self.tasks[rank].files:
            position = 0
            for document in documents(file, self.keys, self.on_error, self.losses):
                yield Document(document.text, document.where, metadata={**document.fields, "file": file.name})
                progress.advance(document.position - position)
                position = document.position
            progress.advance(file.size - position)
        progress.write()


class WriteShard(PipelineStep):  # type: ignore[misc]
    """Tokenises what arrives and writes shard ``rank``; its files appear under their names when all are complete.

    A document with ``metadata["ids"]`` is tokenised already, ``metadata["split"]`` says its side, and
    ``metadata["truth"]`` is written to the truth file of its side, one line a document.
    """

    type = "WRITER"
    name = "indexed tokens"

    def __init__(
        self,
        tasks: Sequence[ShardTask],
        reader: ReadShard,
        counted: Sequence[PipelineStep],
        tokenizer: Path,
        recipe: PreparationRecipe,
    ) -> None:
        super().__init__()
        self.tasks = tuple(tasks)
        self.reader = reader
        self.counted = tuple(counted)
        """Steps whose dropped documents go into the record."""
        self.tokenizer = tokenizer
        self.recipe = recipe

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> None:
        """Use up ``data``."""
        task = self.tasks[rank]
        tokenizer = loaded(self.tokenizer)
        writers = {split: _SplitWriter(task, split, tokenizer) for split in SPLITS}
        for document in data:
            split = document.metadata.get("split") or side(document, self.recipe)
            writers[split].add(document, len(document.text.encode()))
        counts = np.stack([writers[split].finish() for split in SPLITS])
        with task.partial("counts.npy").open("wb") as stream:
            np.save(stream, counts)
        names = [f"{split}.{kind}" for split in SPLITS for kind in ("bin", "idx", TRUTH)] + ["counts.npy"]
        reasons: Counter[str] = Counter()
        for step in self.counted:
            reasons.update(dropped(step))
        complete(task, names, {split: writers[split].size() for split in SPLITS}, self.reader.losses, dict(reasons))


class _SplitWriter:
    """Collects the documents of one split, tokenises them in batches and writes them down."""

    def __init__(self, task: ShardTask, split: Split, tokenizer: Tokenizer) -> None:
        data, index = task.partial(f"{split}.bin"), task.partial(f"{split}.idx")
        self._indexed = IndexedWriter(data, index, token_dtype(tokenizer.vocab_size))
        self._truth = task.partial(f"{split}.{TRUTH}").open("w")
        self._tokenizer = tokenizer
        self._counts: NDArray[np.int64] = np.zeros(tokenizer.vocab_size, dtype=np.int64)
        self._waiting: list[str] = []
        self._waiting_bytes = 0
        self._documents = 0
        self._text_bytes = 0

    def add(self, document: Document, text_bytes: int) -> None:
        """Take one document, of so many bytes of text."""
        self._text_bytes += text_bytes
        if "truth" in document.metadata:
            self._truth.write(json.dumps(document.metadata["truth"]) + "\n")
        if "ids" in document.metadata:
            self._tokenise()
            self._write([document.metadata["ids"]])
            return
        self._waiting.append(document.text)
        self._waiting_bytes += text_bytes
        if self._waiting_bytes >= _BATCH_BYTES:
            self._tokenise()

    def finish(self) -> NDArray[np.int64]:
        """Write the index; how often each token occurs, (vocab_size,) int64."""
        self._tokenise()
        self._indexed.finish()
        self._truth.close()
        return self._counts

    def size(self) -> SplitCount:
        """What was written."""
        return SplitCount(self._documents, int(self._counts.sum()), self._text_bytes)

    def _tokenise(self) -> None:
        self._write(self._tokenizer.encode_batch(self._waiting))
        self._waiting, self._waiting_bytes = [], 0

    def _write(self, documents: Sequence[NDArray[np.int64]]) -> None:
        """Write documents of token ids, (tokens,) int64, each with an end of document behind it."""
        if not documents:
            return
        end = np.array([self._tokenizer.eod])
        tokens = np.concatenate([piece for ids in documents for piece in (ids, end)])
        self._indexed.add(tokens, [len(ids) + 1 for ids in documents])
        self._counts += np.bincount(tokens, minlength=len(self._counts))
        self._documents += len(documents)
