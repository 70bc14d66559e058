"""Packing: documents end to end until a length in tokens is reached, with statements and questions where asked for."""

from __future__ import annotations

import hashlib
import random
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol

import numpy as np
from datatrove.data import Document
from numpy.typing import NDArray

from data_prep.long.tasks import TASKS, Task
from data_prep.recipe import LongConfig, Policy
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import Tokenizer

_TOO_LONG = "longer than long.lengths"
_NO_QUESTIONS = "its questions are no list of {question, answer}"


@dataclass(frozen=True, slots=True)
class Packed:
    """A long document."""

    ids: NDArray[np.int64]
    """(tokens,) without the end of document."""
    text: str
    truth: dict[str, Any] | None = None
    """For tasks: kind, tokens, and questions with their answers and the offsets of their evidence in tokens."""


class Packer(Protocol):
    """Takes documents and gives long ones."""

    def add(self, document: Document) -> Iterator[Packed]:
        """The long documents that this one completes."""

    def finish(self) -> Iterator[Packed]:
        """What is left at the end."""


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    ids: NDArray[np.int64]


class TextPacker:
    """Packs text to exactly the lengths of the recipe; a document that does not fit goes on in the next one.

    For the synthetic kinds statements stand between paragraphs and questions at the end. The last one is shorter.
    """

    def __init__(self, config: LongConfig, tokenizer: Tokenizer) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._waiting: deque[_Piece] = deque()
        self._waiting_tokens = 0
        self._numbers = count()
        self._target = self._next_target()

    def add(self, document: Document) -> Iterator[Packed]:
        """The long documents that this one completes."""
        for piece in _paragraphs(f"{document.text.rstrip()}\n\n", self._tokenizer):
            self._waiting.append(piece)
            self._waiting_tokens += len(piece.ids)
        while self._waiting_tokens >= self._target:
            yield self._make()

    def finish(self) -> Iterator[Packed]:
        """What is left, the last document shorter."""
        while self._waiting:
            yield self._make()

    def _next_target(self) -> int:
        lengths = self._config.lengths
        return lengths[next(self._numbers) % len(lengths)] - 1  # the end of document

    def _make(self) -> Packed:
        target, self._target = self._target, self._next_target()
        make = TASKS.get(self._config.kind)
        if make is None:
            return _joined(self._take(target))
        digest = hashlib.sha256(self._waiting[0].text.encode()).hexdigest()
        task = make(random.Random(f"{self._config.seed}/{digest}"), self._config.items, self._config.hops)
        statements = [_piece(f"{statement}\n\n", self._tokenizer) for statement in task.statements]
        questions = _questions([(item.question, item.answer) for item in task.questions], self._tokenizer)
        added = _size([*statements, *questions])
        if added >= target:
            raise UserError(
                f"long.lengths={list(self._config.lengths)}",
                why=f"statements and questions alone have {added} tokens",
                nearest="greater lengths, or fewer long.items or long.hops",
            )
        return _scattered(self._config, task, self._take(target - added), statements, questions, digest)

    def _take(self, tokens: int) -> list[_Piece]:
        """At most so many tokens of what waits; the last piece is cut."""
        taken = []
        tokens = min(tokens, self._waiting_tokens)
        self._waiting_tokens -= tokens
        while tokens:
            piece = self._waiting.popleft()
            if len(piece.ids) > tokens:
                head, rest = piece.ids[:tokens], piece.ids[tokens:]
                self._waiting.appendleft(_Piece(self._tokenizer.decode(rest.tolist()), rest))
                piece = _Piece(self._tokenizer.decode(head.tolist()), head)
            taken.append(piece)
            tokens -= len(piece.ids)
        return taken


def _scattered(
    config: LongConfig,
    task: Task,
    text: Sequence[_Piece],
    statements: Sequence[_Piece],
    questions: Sequence[_Piece],
    digest: str,
) -> Packed:
    """Statements in random order before random pieces of text, the questions at the end."""
    rng = random.Random(f"places/{config.seed}/{digest}")
    order = rng.sample(range(len(statements)), len(statements))
    places = sorted(rng.randrange(len(text)) for _ in statements)
    pieces: list[_Piece] = []
    offsets: dict[int, int] = {}
    position = 0
    before = iter(zip(places, order, strict=True))
    following = next(before, None)
    for number, piece in enumerate(text):
        while following is not None and following[0] == number:
            offsets[following[1]] = position
            pieces.append(statements[following[1]])
            position += len(pieces[-1].ids)
            following = next(before, None)
        pieces.append(piece)
        position += len(piece.ids)
    packed = _joined([*pieces, *questions])
    answers = [
        {"question": item.question, "answer": item.answer, "evidence": [offsets[i] for i in item.evidence]}
        for item in task.questions
    ]
    return Packed(packed.ids, packed.text, {"kind": config.kind, "tokens": len(packed.ids) + 1, "questions": answers})


@dataclass(frozen=True, slots=True)
class _Asked:
    document: int
    question: str
    answer: str
    piece: _Piece


class QuestionPacker:
    """Packs whole documents under their numbers, and at the end the questions that came with them in random order."""

    def __init__(self, config: LongConfig, tokenizer: Tokenizer, on_error: Policy, drop: Callable[[str], None]) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._on_error = on_error
        self._drop = drop
        self._numbers = count()
        self._target = self._next_target()
        self._documents: list[_Piece] = []
        self._questions: list[_Asked] = []
        self._filled = 0

    def add(self, document: Document) -> Iterator[Packed]:
        """The long document that this one does not fit into any more."""
        pairs = _pairs(document.metadata[self._config.questions_field])
        if pairs is None:
            self._refuse(document)
            return
        piece, asked, size = self._numbered(document.text, pairs)
        if self._documents and self._filled + size > self._target:
            yield self._make()
            piece, asked, size = self._numbered(document.text, pairs)
        if size > self._target:
            self._drop(_TOO_LONG)
            return
        self._documents.append(piece)
        self._questions += asked
        self._filled += size

    def finish(self) -> Iterator[Packed]:
        """The documents that are left."""
        if self._documents:
            yield self._make()

    def _next_target(self) -> int:
        lengths = self._config.lengths
        return lengths[next(self._numbers) % len(lengths)] - 1  # the end of document

    def _numbered(self, text: str, pairs: Sequence[tuple[str, str]]) -> tuple[_Piece, list[_Asked], int]:
        """The next document and its questions under its number, and their tokens."""
        number = len(self._documents) + 1
        piece = _piece(f"Document {number}\n\n{text.rstrip()}\n\n", self._tokenizer)
        named = [(f"(document {number}) {question}", answer) for question, answer in pairs]
        pieces = _questions(named, self._tokenizer)
        asked = [_Asked(number, *pair, asked) for pair, asked in zip(named, pieces, strict=True)]
        return piece, asked, _size([piece, *pieces])

    def _refuse(self, document: Document) -> None:
        if self._on_error == "stop":
            raise UserError(document.id, why=_NO_QUESTIONS, nearest="repair it, or on_error=skip")
        self._drop(_NO_QUESTIONS)

    def _make(self) -> Packed:
        digest = hashlib.sha256(self._documents[0].text.encode()).hexdigest()
        asked = random.Random(f"{self._config.seed}/{digest}").sample(self._questions, len(self._questions))
        starts = np.cumsum([0, *(len(piece.ids) for piece in self._documents)])
        packed = _joined([*self._documents, *(item.piece for item in asked)])
        answers = [
            {"question": item.question, "answer": item.answer, "evidence": [int(starts[item.document - 1])]}
            for item in asked
        ]
        self._documents, self._questions, self._filled = [], [], 0
        self._target = self._next_target()
        truth = {"kind": self._config.kind, "tokens": len(packed.ids) + 1, "questions": answers}
        return Packed(packed.ids, packed.text, truth)


def _pairs(questions: object) -> list[tuple[str, str]] | None:
    """Questions and answers of a record; None when they have another form."""
    if not isinstance(questions, list):
        return None
    pairs = []
    for item in questions:
        question, answer = (item.get("question"), item.get("answer")) if isinstance(item, dict) else (None, None)
        if not isinstance(question, str) or not isinstance(answer, str):
            return None
        pairs.append((question, answer))
    return pairs


def _questions(pairs: Sequence[tuple[str, str]], tokenizer: Tokenizer) -> list[_Piece]:
    return [_piece(f"Question: {question}\nAnswer: {answer}\n\n", tokenizer) for question, answer in pairs]


def _size(pieces: Sequence[_Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _paragraphs(text: str, tokenizer: Tokenizer) -> list[_Piece]:
    parts = text.split("\n\n")
    paragraphs = [*(f"{part}\n\n" for part in parts[:-1]), *filter(None, parts[-1:])]
    encoded = tokenizer.encode_batch(paragraphs)
    return [_Piece(part, ids) for part, ids in zip(paragraphs, encoded, strict=True)]


def _piece(text: str, tokenizer: Tokenizer) -> _Piece:
    return _Piece(text, np.asarray(tokenizer.encode(text), dtype=np.int64))


def _joined(pieces: Sequence[_Piece]) -> Packed:
    return Packed(np.concatenate([piece.ids for piece in pieces]), "".join(piece.text for piece in pieces))
