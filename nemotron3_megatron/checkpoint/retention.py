"""Which checkpoints of a run stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from nemotron3_megatron.config.run import Run


@dataclass(frozen=True, slots=True)
class Retention:
    """A checkpoint stays if any of the three keeps it. The newest always stays."""

    keep_last: int | None = None
    """The newest so many; None: all."""
    keep_every_tokens: int | None = None
    """The first one at or after each multiple of so many tokens, for merging."""
    keep_best: int = 0
    """The so many with the lowest validation loss."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What retention knows of a complete checkpoint."""

    step: int
    tokens: int | None
    """Seen when it was saved, if its state says so."""
    validation_loss: float | None
    """Measured at this very step, if one was."""


def retention_of(run: Run) -> Retention:
    """What the recipe's ``checkpoint`` asks for."""
    options = run.checkpoint
    every = options.keep_every
    return Retention(
        keep_last=options.keep_last,
        keep_every_tokens=None if every is None else every.in_tokens(run.stages[0].tokens_per_step),
        keep_best=options.keep_best,
    )


def kept(found: Sequence[Saved], rule: Retention) -> set[int]:
    """Steps of the checkpoints that stay."""
    by_step = sorted(found, key=lambda saved: saved.step)
    if rule.keep_last is None:
        return {saved.step for saved in by_step}
    steps = {saved.step for saved in by_step[-max(rule.keep_last, 1) :]}
    if rule.keep_every_tokens is not None:
        interval = rule.keep_every_tokens
        counted = [(saved.tokens // interval, saved.step) for saved in by_step if saved.tokens is not None]
        steps |= {next(group)[1] for number, group in groupby(counted, key=lambda pair: pair[0]) if number > 0}
    measured = [saved for saved in by_step if saved.validation_loss is not None]
    best = sorted(measured, key=lambda saved: (saved.validation_loss, saved.step))[: rule.keep_best]
    return steps | {saved.step for saved in best}
