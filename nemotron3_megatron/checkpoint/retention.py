"""Which checkpoints of a run stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.run import Run


@dataclass(frozen=True, slots=True)
class Retention:
    """A checkpoint stays if any of the three keeps it. The newest always stays."""

    keep_last: int | None = None
    """The newest so many; None: all."""
    keep_every: Duration | None = None
    """The first one at or after each multiple of so many steps or tokens, for merging."""
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
    return Retention(options.keep_last, options.keep_every, options.keep_best)


def kept(found: Sequence[Saved], rule: Retention) -> set[int]:
    """Steps of the checkpoints that stay."""
    by_step = sorted(found, key=lambda saved: saved.step)
    if rule.keep_last is None:
        return {saved.step for saved in by_step}
    steps = {saved.step for saved in by_step[-max(rule.keep_last, 1) :]}
    if rule.keep_every is not None:
        steps |= _firsts(by_step, rule.keep_every)
    # NaN, the loss of a run that has diverged, is neither below nor above another: it would end the sorting.
    measured = [
        saved for saved in by_step if saved.validation_loss is not None and not math.isnan(saved.validation_loss)
    ]
    best = sorted(measured, key=lambda saved: (saved.validation_loss, saved.step))[: rule.keep_best]
    return steps | {saved.step for saved in best}


def _firsts(by_step: Sequence[Saved], every: Duration) -> set[int]:
    """Steps of the first at or after each multiple of ``every``; one whose tokens are not known is at none."""
    done = [(saved.step if every.unit == "steps" else saved.tokens, saved.step) for saved in by_step]
    counted = [(amount // every.value, step) for amount, step in done if amount is not None]
    return {next(group)[1] for number, group in groupby(counted, key=lambda pair: pair[0]) if number > 0}
