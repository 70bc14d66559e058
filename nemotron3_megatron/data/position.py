"""Where a blended stream stands, as counts: all that is needed to go on."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

from nemotron3_megatron.data.blend import Blend

Sample = tuple[str, int]
"""A source's name and the index of a window in its stream."""
Counts = Mapping[int, Mapping[str, int]]
"""Samples by sequence length and source: every length is a stream of its own, with exact shares."""


@dataclass(frozen=True, slots=True)
class Position:
    """Samples drawn; immutable."""

    drawn: Counts = field(default_factory=dict)
    """Since the beginning: the next window of each source."""
    drawn_from_blend: Counts = field(default_factory=dict)
    """Since the blend last changed: whose turn is next."""

    def draw(self, blend: Blend, seq_length: int, samples: int) -> tuple[list[Sample], Position]:
        """The next ``samples`` samples of this sequence length, and the position after them."""
        turns = blend.draw(self.drawn_from_blend.get(seq_length, {}), samples)
        drawn = dict(self.drawn.get(seq_length, {}))
        from_blend = dict(self.drawn_from_blend.get(seq_length, {}))
        chosen = []
        for name in turns:
            chosen.append((name, drawn.get(name, 0)))
            drawn[name] = drawn.get(name, 0) + 1
            from_blend[name] = from_blend.get(name, 0) + 1
        after = Position({**self.drawn, seq_length: drawn}, {**self.drawn_from_blend, seq_length: from_blend})
        return chosen, after

    def under_new_blend(self, kept: Set[str]) -> Position:
        """The position when the blend changes: ``kept`` sources go on, the shares count from here."""
        drawn = {
            length: {name: count for name, count in counts.items() if name in kept}
            for length, counts in self.drawn.items()
        }
        return Position(drawn, {})

    def to_dict(self) -> dict[str, Any]:
        """As plain ints and strings (lengths become strings, for JSON)."""
        return {"drawn": _plain(self.drawn), "drawn_from_blend": _plain(self.drawn_from_blend)}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Position:
        """The inverse of ``to_dict``."""
        return cls(_counts(state["drawn"]), _counts(state["drawn_from_blend"]))


def _plain(counts: Counts) -> dict[str, dict[str, int]]:
    return {str(length): dict(by_source) for length, by_source in counts.items()}


def _counts(plain: Mapping[str, Mapping[str, int]]) -> Counts:
    return {int(length): dict(by_source) for length, by_source in plain.items()}
