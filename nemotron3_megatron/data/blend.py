"""Whose turn it is: samples of several sources, interleaved deterministically by weight.

With ``n`` samples drawn in all, a source of share ``w`` has been drawn more than ``w * n - 1`` and fewer than
``w * n + 1`` times, for every n. Drawing from the largest deficit alone does not keep the lower bound with many
sources; therefore sample j of a source is *due*: not before ``floor(j / w)``, and before ``ceil((j + 1) / w)``, and
the turn goes to the earliest deadline among those that may run. Earliest deadline first meets every deadline here,
because the shares sum to one (Tijdeman, "The chairman assignment problem", Discrete Mathematics 32, 1980).
All arithmetic is on integers: a turn depends on the counts alone, never on rounding.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from fractions import Fraction

from nemotron3_megatron.config.errors import UserError


class Blend:
    """Names with integer weights; immutable."""

    def __init__(self, weights: Mapping[str, float | Fraction]) -> None:
        """Take the weights of a recipe, which need not sum to one.

        Raises:
            UserError: there is no source, a weight is negative or not finite, or all are 0.
        """
        for name, weight in weights.items():
            if not (math.isfinite(weight) and weight >= 0):
                raise UserError(f"the weight of source {name!r} is {weight}", why="a weight is a number >= 0")
        # The decimal the user wrote (0.3 is 3/10), not the binary float next to it.
        exact = {
            name: weight if isinstance(weight, Fraction) else Fraction(repr(weight))
            for name, weight in sorted(weights.items())
            if weight
        }
        if not exact:
            raise UserError("the blend is empty", why="at least one source needs a weight above 0")
        total = sum(exact.values())
        self.shares = {name: weight / total for name, weight in exact.items()}
        """Fraction of the samples of each source; sources of weight 0 are left out."""
        self._total = math.lcm(*(share.denominator for share in self.shares.values()))
        self._weights = [(name, int(share * self._total)) for name, share in self.shares.items()]

    def draw(self, counts: Mapping[str, int], samples: int) -> list[str]:
        """Sources of the next ``samples`` samples, given how many each source has had (0 when absent)."""
        had = {name: counts.get(name, 0) for name in self.shares}
        drawn = sum(had.values())
        turns = []
        for now in range(drawn, drawn + samples):
            turn = self._turn(had, now)
            had[turn] += 1
            turns.append(turn)
        return turns

    def _turn(self, had: Mapping[str, int], now: int) -> str:
        due = [
            (-(-(had[name] + 1) * self._total // weight), name)
            for name, weight in self._weights
            if had[name] * self._total < (now + 1) * weight
        ]
        return min(due)[1]
