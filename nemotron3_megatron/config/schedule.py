"""Stages on the axes of steps and tokens, and the learning-rate schedule along them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.recipe import LengthConfig, Recipe, StageConfig
from nemotron3_megatron.config.run import ConstantRate, Schedule
from nemotron3_megatron.config.stage import Shape, Span, Stage, recurring_order


def resolve_stages(recipe: Recipe, dp: Mapping[str, int] | None = None) -> tuple[Stage, ...]:
    """The recipe's stages in order; each is rounded up to whole steps.

    Args:
        recipe: legal, but for its schedule.
        dp: data-parallel ranks by stage, of which nothing but ``num_microbatches`` depends; None: one.
    """
    stages: list[Stage] = []
    step = token = 0
    for name, config in recipe.stages.items():
        spans = tuple(_spans(config, step, token, dp[name] if dp else 1))
        *_, full = spans
        steps = _steps(config.tokens, spans)
        own = full.shapes[0]
        stage = Stage(
            name=name,
            first_step=step,
            steps=steps,
            first_token=token,
            tokens_per_step=own.tokens_per_step,
            seq_length=own.seq_length,
            global_batch_size=own.global_batch_size,
            micro_batch_size=own.micro_batch_size,
            num_microbatches=own.num_microbatches,
            blend=own.blend,
            spans=() if len(spans) == len(full.shapes) == 1 else _begun(spans, step + steps),
        )
        stages.append(stage)
        step, token = stage.end_step, stage.tokens_at(stage.end_step)
    return tuple(stages)


def lengths(config: StageConfig, batch_tokens: int) -> dict[str, LengthConfig]:
    """The stage's own length, by the name "", and the others, while the stage's batch is of ``batch_tokens``.

    ``batch_tokens`` and ``blend`` of each are filled in.
    """
    others = config.other_lengths.values()
    own = LengthConfig(
        seq_length=config.seq_length,
        share=float(1 - sum(_exact(other.share) for other in others)),
        micro_batch_size=config.micro_batch_size,
    )
    return {
        name: LengthConfig(
            seq_length=each.seq_length,
            share=each.share,
            batch_tokens=each.batch_tokens or batch_tokens,
            micro_batch_size=each.micro_batch_size,
            blend=each.blend or config.blend,
        )
        for name, each in {"": own, **config.other_lengths}.items()
    }


def batch_sizes(config: StageConfig) -> Iterator[int]:
    """Tokens of a step's batch, from the first step's to the full one."""
    full = config.batch_tokens or (config.global_batch_size or 0) * config.seq_length
    rampup = config.batch_rampup
    yield from range(rampup.start_tokens, full, rampup.increment_tokens) if rampup else ()
    yield full


def _spans(config: StageConfig, step: int, token: int, dp: int) -> Iterator[Span]:
    """A span for each size of the batch, as if the stage were long enough."""
    sizes = list(batch_sizes(config))
    rampup = config.batch_rampup
    for size in sizes:
        found = lengths(config, size)
        span = Span(
            first_step=step,
            first_token=token,
            shapes=tuple(_shape(each, dp) for each in found.values()),
            order=recurring_order(_shares(config)),
        )
        yield span
        if rampup is not None and size != sizes[-1]:
            steps = _part(rampup.over, len(sizes) - 1, span)
            step, token = step + steps, span.tokens_at(step + steps)


def _shares(config: StageConfig) -> tuple[Fraction, ...]:
    others = [_exact(other.share) for other in config.other_lengths.values()]
    return (1 - sum(others, Fraction(0)), *others)


def _exact(share: float) -> Fraction:
    """The decimal that the user wrote (0.08 is 2/25), not the binary float next to it."""
    return Fraction(repr(share))


def _shape(length: LengthConfig, dp: int) -> Shape:
    tokens = length.batch_tokens or 0
    sequences = tokens // length.seq_length
    return Shape(
        tokens_per_step=sequences * length.seq_length,
        seq_length=length.seq_length,
        global_batch_size=sequences,
        micro_batch_size=length.micro_batch_size,
        num_microbatches=sequences // (length.micro_batch_size * dp),
        blend=length.blend,
    )


def _part(whole: Duration, parts: int, span: Span) -> int:
    """Steps of an equal part of a ramp-up."""
    each = Duration(whole.value / parts, whole.unit)
    return each.in_steps(1) if each.unit == "steps" else span.steps_for(each.in_tokens(1))


def _steps(length: Duration, spans: Sequence[Span]) -> int:
    """Steps of a stage from the beginning of its first span."""
    first = spans[0]
    if length.unit == "steps":
        return length.in_steps(1)
    end = first.first_token + length.in_tokens(1)
    span = next((span for span in reversed(spans) if span.first_token < end), first)
    return span.first_step - first.first_step + span.steps_for(end - span.first_token)


def _begun(spans: Sequence[Span], end_step: int) -> tuple[Span, ...]:
    """Those that begin before the stage ends."""
    return tuple(span for span in spans if span.first_step < end_step)


def resolve_schedule(recipe: Recipe, stages: Sequence[Stage]) -> Schedule:
    """The schedule in tokens.

    A decay without an end runs to the end of the last stage without a learning rate of its own, whatever
    ``max_steps`` says, so that a run cut short follows the same curve.
    """
    optimizer = recipe.optimizer
    end = optimizer.lr_decay
    tail = optimizer.lr_wsd_decay
    own = {name: stage.lr for name, stage in recipe.stages.items()}
    last = [stage for stage in stages if own[stage.name] is None][-1:] or [stages[-1]]
    return Schedule(
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_tokens=_tokens_from_start(optimizer.lr_warmup, stages),
        decay_end_tokens=_tokens_from_start(end, stages) if end else last[0].tokens_at(last[0].end_step),
        wsd_decay_tokens=tail.in_tokens(last[0].tokens_per_step) if tail else 0,
        decay_style=optimizer.lr_decay_style,
        wsd_decay_style=optimizer.lr_wsd_decay_style,
        constant=tuple(
            ConstantRate(first_token=stage.first_token, end_token=stage.tokens_at(stage.end_step), lr=lr)
            for stage in stages
            if (lr := own[stage.name]) is not None
        ),
    )


def _tokens_from_start(duration: Duration, stages: Sequence[Stage]) -> int:
    """Tokens after ``duration`` from the start of the run; the last stage is thought to go on for ever."""
    if duration.unit == "tokens":
        return duration.in_tokens(1)
    steps = duration.in_steps(1)
    stage = next((stage for stage in stages if steps < stage.end_step), stages[-1])
    return stage.tokens_at(steps)
