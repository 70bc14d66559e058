"""Where a blended stream stands, as counts: all that is needed to go on."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from nemotron3_megatron.data.blend import Blend

Sample = tuple[str, int]
"""A source's name and the index of a window in its stream."""
Counts = Mapping[int, Mapping[str, int]]
"""Samples by sequence length and source: every length is a stream of its own, whichever blends read it."""
Turns = Mapping[str, Mapping[str, int]]
"""Samples by stream of turns (a blend at one length, see ``stream``) and source: each has exact shares."""


@dataclass(frozen=True, slots=True)
class Position:
    """Samples drawn; immutable."""

    drawn: Counts = field(default_factory=dict)
    """Since the beginning: the next window of each source."""
    drawn_from_blend: Turns = field(default_factory=dict)
    """Since the blend last changed: whose turn is next."""

    def draw(
        self, blend: Blend, seq_length: int, samples: int, name: str | None = None
    ) -> tuple[list[Sample], Position]:
        """The next ``samples`` samples of this sequence length from a blend, and the position after them."""
        key = stream(name, seq_length)
        turns = blend.draw(self.drawn_from_blend.get(key, {}), samples)
        drawn = dict(self.drawn.get(seq_length, {}))
        from_blend = dict(self.drawn_from_blend.get(key, {}))
        chosen = []
        for source in turns:
            chosen.append((source, drawn.get(source, 0)))
            drawn[source] = drawn.get(source, 0) + 1
            from_blend[source] = from_blend.get(source, 0) + 1
        after = Position({**self.drawn, seq_length: drawn}, {**self.drawn_from_blend, key: from_blend})
        return chosen, after

    def under_new_blend(self, kept: Set[str]) -> Position:
        """The position when blends change: ``kept`` sources go on, all shares count from here."""
        drawn = {
            length: {name: count for name, count in counts.items() if name in kept}
            for length, counts in self.drawn.items()
        }
        return Position(drawn, {})

    def to_dict(self) -> dict[str, Any]:
        """As plain ints and strings (lengths become strings, for JSON)."""
        turns = {key: dict(by_source) for key, by_source in self.drawn_from_blend.items()}
        return {"drawn": _plain(self.drawn), "drawn_from_blend": turns}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Position:
        """The inverse of ``to_dict``."""
        turns = {key: dict(by_source) for key, by_source in state["drawn_from_blend"].items()}
        return cls(_counts(state["drawn"]), turns)


def stream(blend: str | None, seq_length: int) -> str:
    """The key of a blend's turns at one length: ``8192``, or ``phase1@8192`` for a blend that has a name."""
    return str(seq_length) if blend is None else f"{blend}@{seq_length}"


def _plain(counts: Counts) -> dict[str, dict[str, int]]:
    return {str(length): dict(by_source) for length, by_source in counts.items()}


def _counts(plain: Mapping[str, Mapping[str, int]]) -> Counts:
    return {int(length): dict(by_source) for length, by_source in plain.items()}
