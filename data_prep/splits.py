"""Which documents of the input count, and on which side of the split they fall."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from datatrove.data import Document as Text

from data_prep.inputs import InputFile
from data_prep.readers import Defect, Document, Keys, read
from data_prep.recipe import Policy, PreparationRecipe
from nemotron3_megatron.config.errors import UserError

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_EXAMPLES = 10


@dataclass(slots=True)
class Losses:
    """What was left out, for the report."""

    empty_documents: int = 0
    defects: int = 0
    examples: list[str] = field(default_factory=list)
    """The first defects, in words."""

    def add(self, defect: Defect) -> None:
        """Count a defect."""
        self.defects += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(f"{defect.where}: {defect.why}")


def split_of(text: bytes, validation_fraction: float) -> Split:
    """The side of a document: a function of its text alone, so that no text is on both.

    The first 8 bytes of the text's sha256, as a number in [0, 1), are below the fraction: validation.
    """
    if not validation_fraction:
        return "train"
    draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big")
    return "validation" if draw < validation_fraction * 2**64 else "train"


def side(document: Text, recipe: PreparationRecipe) -> Split:
    """The side of a document whose ``metadata`` has the name of its ``file``: by its text, or by its repository."""
    whole = recipe.validation_by == "repository"
    decides = repository_of_file(document.metadata["file"]) if whole else document.text
    return split_of(decides.encode(), recipe.validation_fraction)


def repository_of_file(name: str) -> str:
    """The first directory of a file's path below the entry of ``input.paths`` that it was found by."""
    return name.split("/", 1)[0] if "/" in name else ""


def documents(file: InputFile, keys: Keys, policy: Policy, losses: Losses) -> Iterator[Document]:
    """The documents of a file that are not empty; everything else is counted in ``losses``.

    Raises:
        UserError: a defect, when the policy is ``stop``.
    """
    for item in read(file, keys):
        if isinstance(item, Document):
            if item.text:
                yield item
            else:
                losses.empty_documents += 1
            continue
        losses.add(item)
        if policy == "stop":
            raise UserError(
                f"{file.path} cannot be used",
                where=item.where,
                why=item.why,
                nearest="repair it, or on_error=skip to leave such input out and have it reported",
            )
