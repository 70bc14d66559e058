"""What a run will read of each source: exact, from the recipe's blends and stages alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import DataConfig
from nemotron3_megatron.config.run import Run, Shape
from nemotron3_megatron.data.blend import Blend

UNTAGGED = "untagged"
"""The tag of sources without one, where others have one."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Of one source, in the steps of one shape."""

    stage: str
    shape: Shape
    source: str
    tokens: Fraction
    """Expected: a source is drawn at most one sequence more or fewer than its share."""


def blend_of(data: DataConfig, name: str | None) -> Blend:
    """A blend by name, those it names resolved to their sources; None: all sources by their own weights.

    Raises:
        UserError: there is no source, or a weight is unusable.
    """
    if name is None:
        return Blend({source: config.weight for source, config in data.sources.items()})
    shares: dict[str, Fraction] = {}
    for part, share in Blend(data.blends[name]).shares.items():
        inner = blend_of(data, part).shares if part in data.blends else {part: Fraction(1)}
        for source, within in inner.items():
            shares[source] = shares.get(source, Fraction(0)) + share * within
    return Blend(shares)


def blends_of(run: Run) -> dict[str | None, Blend]:
    """All blends that the run's stages read."""
    names = dict.fromkeys(shape.blend for stage in run.stages for shape in stage.shapes)
    return {name: blend_of(run.data, name) for name in names}


def planned(run: Run, blends: Mapping[str | None, Blend]) -> Iterator[Reading]:
    """All that the run reads until its last step."""
    for stage in run.stages:
        for shape, steps in stage.until(run.total_steps).step_counts():
            tokens = steps * shape.tokens_per_step
            for source, share in blends[shape.blend].shares.items():
                yield Reading(stage.name, shape, source, share * tokens)


def planned_tokens(run: Run, blends: Mapping[str | None, Blend]) -> dict[str, Fraction]:
    """Tokens of each source over the whole run."""
    tokens: dict[str, Fraction] = {}
    for reading in planned(run, blends):
        tokens[reading.source] = tokens.get(reading.source, Fraction(0)) + reading.tokens
    return tokens


def check_amounts(run: Run, blends: Mapping[str | None, Blend], tokens: Mapping[str, int]) -> None:
    """Refuse a run, before it starts, that one of its stages would end for want of text.

    Args:
        tokens: how many each source has.

    Raises:
        UserError: a source is shorter than a window, or would be read more often than it may be.
    """
    for reading in planned(run, blends):
        if reading.tokens and tokens[reading.source] <= (length := reading.shape.seq_length):
            raise UserError(
                f"data.sources.{reading.source} has {tokens[reading.source]:,} tokens",
                why=f"stage {reading.stage} reads windows of seq_length={length:,} and the next token",
                nearest="more text, a blend without this source, or a smaller seq_length",
            )
    for name, read in planned_tokens(run, blends).items():
        limit, epochs = run.data.sources[name].max_epochs, float(read / tokens[name])
        if limit is not None and epochs > limit:
            raise UserError(
                f"data.sources.{name}.max_epochs={limit:g}",
                why=f"the run would read the source's {tokens[name]:,} tokens {epochs:.3g} times",
                nearest=f"a smaller weight, fewer tokens, or max_epochs={math.ceil(epochs)}",
            )


def tags_of(data: DataConfig) -> tuple[str, ...]:
    """The tags by which losses are told apart, of training and validation sources; none where all have the same."""
    sources = (*data.sources.values(), *data.validation.values())
    found = tuple(dict.fromkeys(source.tag or UNTAGGED for source in sources))
    return found if len(found) > 1 else ()
