"""Questions over statements that are scattered through a long document, with their answers.

The templates are this project's own. A statement alone answers a retrieval question; multi_hop questions need several
in a chain; aggregation questions need the sum over several. Every statement of one question has look-alikes.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass

from data_prep.recipe import LongKind

_ONSETS = ("b", "br", "d", "dr", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "st", "t", "tr", "v", "w", "z")
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "ou")
_CODAS = ("l", "m", "n", "nd", "r", "rk", "s", "st", "t", "v")
_OBJECTS = (
    "astrolabe",
    "lantern",
    "ledger",
    "map",
    "medal",
    "mirror",
    "music box",
    "seal ring",
    "spyglass",
    "tapestry",
)
_THINGS = (
    "beetles",
    "comets",
    "footprints",
    "herons",
    "meteorites",
    "orchids",
    "otters",
    "shells",
    "sparrows",
    "wells",
)
_LOOKALIKES = 2
"""Statements of the same form that no question asks for, to each one that is asked for."""


@dataclass(frozen=True, slots=True)
class Question:
    """A question with its answer."""

    question: str
    answer: str
    evidence: tuple[int, ...]
    """Numbers of the statements that together give the answer."""


@dataclass(frozen=True, slots=True)
class Task:
    """Statements to scatter, in no particular order, and questions to ask at the end."""

    statements: tuple[str, ...]
    questions: tuple[Question, ...]


def retrieval(rng: random.Random, items: int, _: int) -> Task:
    """Each question asks for what one statement says."""
    archives = _names(rng, 1 + items)
    places = [(thing, archive) for archive in archives for thing in _OBJECTS]
    chosen = rng.sample(places, min(len(places), items * (1 + _LOOKALIKES)))
    codes = rng.sample(range(100_000, 1_000_000), len(chosen))
    statements = [
        f"The archive of {archive} keeps a {thing} under the number {code}."
        for (thing, archive), code in zip(chosen, codes, strict=True)
    ]
    questions = [
        Question(f"Under which number does the archive of {archive} keep its {thing}?", str(codes[i]), (i,))
        for i, (thing, archive) in enumerate(chosen[:items])
    ]
    return Task(tuple(statements), tuple(questions))


def multi_hop(rng: random.Random, items: int, hops: int) -> Task:
    """Each question asks where a chain of statements ends; the same people occur in several chains."""
    people = _names(rng, 3 * (hops + 1))
    statements: list[str] = []
    questions = []
    for number in range(items * (1 + _LOOKALIKES)):
        parcel = f"parcel {number + 1}"
        chain = rng.sample(people, hops + 1)
        first = len(statements)
        statements += [f"{giver} handed {parcel} to {taker}." for giver, taker in itertools.pairwise(chain)]
        if number < items:
            evidence = tuple(range(first, len(statements)))
            questions.append(Question(f"{chain[0]} had {parcel} first. Who had it last?", chain[-1], evidence))
    return Task(tuple(statements), tuple(questions))


def aggregation(rng: random.Random, items: int, parts: int) -> Task:
    """Each question asks for the sum of the numbers in several statements."""
    stations = _names(rng, 1 + items)
    pairs = [(station, thing) for station in stations for thing in _THINGS]
    statements: list[str] = []
    questions = []
    for number, (station, thing) in enumerate(rng.sample(pairs, min(len(pairs), items * (1 + _LOOKALIKES)))):
        counts = [rng.randint(2, 99) for _ in range(parts)]
        first = len(statements)
        statements += [f"A report from the {station} station mentions {count} {thing}." for count in counts]
        if number < items:
            question = f"How many {thing} do all reports from the {station} station mention together?"
            questions.append(Question(question, str(sum(counts)), tuple(range(first, len(statements)))))
    return Task(tuple(statements), tuple(questions))


TASKS: dict[LongKind, Callable[[random.Random, int, int], Task]] = {
    "retrieval": retrieval,
    "multi_hop": multi_hop,
    "aggregation": aggregation,
}


def _names(rng: random.Random, count: int) -> list[str]:
    """Different made-up names."""
    names: dict[str, None] = {}
    while len(names) < count:
        syllables = rng.randint(2, 3)
        name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(syllables)) + rng.choice(_CODAS)
        names[name.capitalize()] = None
    return list(names)
