"""A stage on the axes of steps and tokens: what each of its steps reads, in closed form.

Nothing here walks over steps. A stage is a few spans (more than one while the batch is ramped up); in a span the
sequence lengths recur in a fixed order, so the tokens before any step are whole rounds and a part of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from fractions import Fraction

from nemotron3_megatron.config.recipe import ParallelConfig, PrecisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions; world_size = tp * pp * cp * dp."""

    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    sequence_parallel: bool
    hybrid_layer_pattern: str
    """Megatron's pattern: the main stack with '|' pipeline cuts, then '/'-separated MTP depths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The global batch of an optimizer step: sequences of one length, never mixed."""

    tokens_per_step: int
    seq_length: int
    global_batch_size: int
    """Sequences."""
    micro_batch_size: int
    num_microbatches: int
    """Of a data-parallel rank."""
    blend: str | None = None
    """A name in ``data.blends``; None: all sources by their own weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Consecutive steps whose shapes recur in a fixed order."""

    first_step: int
    first_token: int
    shapes: tuple[Shape, ...]
    order: tuple[int, ...]
    """Of a round: an index into ``shapes`` for each step."""

    def shape_at(self, step: int) -> Shape:
        """The shape of a step of the run that lies in this span."""
        return self.shapes[self.order[(step - self.first_step) % len(self.order)]]

    def tokens_at(self, step: int) -> int:
        """Tokens of the run before a step that lies in this span or ends it."""
        rounds, rest = divmod(step - self.first_step, len(self.order))
        sizes = [self.shapes[index].tokens_per_step for index in self.order]
        return self.first_token + rounds * sum(sizes) + sum(sizes[:rest])

    def steps_for(self, tokens: int) -> int:
        """The fewest steps from the span's beginning that cover ``tokens``."""
        sizes = [self.shapes[index].tokens_per_step for index in self.order]
        rounds, rest = divmod(tokens, sum(sizes))
        steps = rounds * len(sizes)
        for size in sizes:
            if rest <= 0:
                break
            rest, steps = rest - size, steps + 1
        return steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage(Shape):
    """A stage with its place on the run's step and token axes; as a shape, that of its own ``seq_length``."""

    name: str
    first_step: int
    steps: int
    first_token: int
    spans: tuple[Span, ...] = ()
    """Where shapes differ from step to step; empty: every step has the stage's own."""
    parallel: ParallelConfig | None = None
    """With ``layout`` and ``precision``: what the stage is trained under; None in a run that never changes anything."""
    layout: Layout | None = None
    precision: PrecisionConfig | None = None
    trainable: tuple[str, ...] = ()
    """As in ``StageConfig``; a start trains one set."""

    @property
    def end_step(self) -> int:
        """The first step after this stage."""
        return self.first_step + self.steps

    @property
    def tokens(self) -> int:
        """Tokens of the whole stage."""
        return self.tokens_at(self.end_step) - self.first_token

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The different shapes of its steps, the full batch's first."""
        if not self.spans:
            return (self,)
        return tuple(dict.fromkeys(shape for span in reversed(self.spans) for shape in span.shapes))

    def shape_at(self, step: int) -> Shape:
        """The shape of the run's step ``step``; the last span is thought to go on for ever."""
        return self._span(step).shape_at(step) if self.spans else self

    def tokens_at(self, step: int) -> int:
        """Tokens of the run before its step ``step``; the last span is thought to go on for ever."""
        if not self.spans:
            return self.first_token + (step - self.first_step) * self.tokens_per_step
        return self._span(step).tokens_at(step)

    def step_counts(self) -> list[tuple[Shape, int]]:
        """How many steps have each shape."""
        if not self.spans:
            return [(self, self.steps)]
        ends = [span.first_step for span in self.spans[1:]] + [self.end_step]
        counts: dict[Shape, int] = {}
        for span, end in zip(self.spans, ends, strict=True):
            steps = max(0, min(end, self.end_step) - span.first_step)
            rounds, rest = divmod(steps, len(span.order))
            for place, index in enumerate(span.order):
                shape = span.shapes[index]
                counts[shape] = counts.get(shape, 0) + rounds + (place < rest)
        return list(counts.items())

    def by_shape(self) -> tuple[Stage, ...]:
        """A stage for each shape, with as many steps as have it: for sums and maxima over shapes."""
        counts = self.step_counts()
        return tuple(
            replace(self, **{item.name: getattr(shape, item.name) for item in fields(Shape)}, steps=steps, spans=())
            for shape, steps in counts
            if steps
        )

    def until(self, step: int) -> Stage:
        """The stage, ended before the run's step ``step`` at the latest."""
        return replace(self, steps=max(0, min(self.end_step, step) - self.first_step))

    def _span(self, step: int) -> Span:
        return next((span for span in reversed(self.spans) if span.first_step <= step), self.spans[0])


def recurring_order(shares: tuple[Fraction, ...]) -> tuple[int, ...]:
    """The shortest round in which index i fills exactly ``shares[i]`` of the places, each spread evenly.

    Each place goes to the index that is furthest behind its share, the first of several. Two shares of one half
    alternate; 92 and 8 % give a round of 25 with the rarer one in its middle and at its end.

    Args:
        shares: positive, of sum 1.
    """
    size = math.lcm(*(share.denominator for share in shares))
    had = [0] * len(shares)
    order = []
    for place in range(1, size + 1):
        behind = [share * place - count for share, count in zip(shares, had, strict=True)]
        chosen = behind.index(max(behind))
        had[chosen] += 1
        order.append(chosen)
    return tuple(order)
