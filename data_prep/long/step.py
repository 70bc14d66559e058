"""The step that makes long documents of short ones, for each side of the split apart."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep.loaded import loaded
from data_prep.long.pack import Packed, Packer, QuestionPacker, TextPacker
from data_prep.long.repositories import repository_documents
from data_prep.recipe import LongConfig, Policy
from data_prep.splits import SPLITS, repository_of_file, split_of
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import Tokenizer

_SAME_PATH = "its path occurs twice in the repository"
_NO_NAMES = "its repository or path is no text"


class LongDocuments(PipelineStep):  # type: ignore[misc]  # datatrove is not typed
    """Gives long documents with ``metadata``: ``ids`` (tokens,) int64 without end of document, ``split``, ``truth``.

    ``truth`` is there for tasks. The documents depend on the documents of the shard, their order and the seed only.
    """

    type = "LONG"
    name = "long documents"

    def __init__(self, config: LongConfig, tokenizer: Path, validation_fraction: float, on_error: Policy) -> None:
        super().__init__()
        self.config = config
        self.tokenizer = tokenizer
        self.validation_fraction = validation_fraction
        self.on_error = on_error

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        """Long documents, those of a side in the order of what they are made of.

        Raises:
            UserError: a length cannot hold its questions; when the policy is ``stop``: questions have another form, or
                a repository or path is no text.
        """
        tokenizer = loaded(self.tokenizer)
        if self.config.kind == "repositories":
            yield from self._repositories(data, tokenizer)
            return
        packers = {split: self._packer(tokenizer) for split in SPLITS}
        for document in data:
            split = split_of(document.text.encode(), self.validation_fraction)
            for packed in packers[split].add(document):
                yield _document(packed, split, document.id)
        for split, packer in packers.items():
            for packed in packer.finish():
                yield _document(packed, split, "end of shard")

    def _packer(self, tokenizer: Tokenizer) -> Packer:
        if self.config.kind == "document_qa":
            return QuestionPacker(self.config, tokenizer, self.on_error, self._drop)
        return TextPacker(self.config, tokenizer)

    def _drop(self, reason: str) -> None:
        self.stat_update("dropped", f"dropped_{reason}")

    def _repositories(self, data: Iterable[Document], tokenizer: Tokenizer) -> Iterator[Document]:
        for name, files in groupby(self._placed(data), lambda placed: placed[0]):
            split = split_of(name.encode(), self.validation_fraction)
            texts: dict[str, str] = {}
            for _, path, text in files:
                if path in texts:
                    self._drop(_SAME_PATH)
                texts.setdefault(path, text)
            for packed in repository_documents(texts, self.config.lengths[-1], tokenizer):
                yield _document(packed, split, name)

    def _placed(self, data: Iterable[Document]) -> Iterator[tuple[str, str, str]]:
        """Repository, path and text of each file."""
        key = self.config.repository_field
        for document in data:
            file = document.metadata["file"]
            names = (repository_of_file(file), file)
            if key is not None:
                names = (document.metadata[key], document.metadata[self.config.path_field])
            if all(isinstance(name, str) for name in names):
                yield *names, document.text
            elif self.on_error == "stop":
                raise UserError(document.id, why=_NO_NAMES, nearest="repair it, or on_error=skip")
            else:
                self._drop(_NO_NAMES)


def _document(packed: Packed, split: str, where: str) -> Document:
    metadata = {"ids": packed.ids, "split": split}
    if packed.truth is not None:
        metadata["truth"] = packed.truth
    return Document(packed.text, where, metadata=metadata)
