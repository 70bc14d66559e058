"""Stages on the axes of steps and tokens, and the learning-rate schedule along them."""

from __future__ import annotations

from collections.abc import Sequence

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.run import Schedule, Stage


def resolve_stages(recipe: Recipe, dp: int) -> tuple[Stage, ...]:
    """The recipe's stages in order; each is rounded up to whole steps."""
    stages: list[Stage] = []
    step = token = 0
    for name, config in recipe.stages.items():
        tokens_per_step = config.global_batch_size * config.seq_length
        steps = config.tokens.in_steps(tokens_per_step)
        stage = Stage(
            name=name,
            first_step=step,
            steps=steps,
            first_token=token,
            tokens_per_step=tokens_per_step,
            seq_length=config.seq_length,
            global_batch_size=config.global_batch_size,
            micro_batch_size=config.micro_batch_size,
            num_microbatches=config.global_batch_size // (config.micro_batch_size * dp),
        )
        stages.append(stage)
        step, token = step + steps, token + steps * tokens_per_step
    return tuple(stages)


def resolve_schedule(recipe: Recipe, stages: Sequence[Stage]) -> Schedule:
    """The schedule in tokens.

    A decay without an end runs to the end of the last stage, whatever ``max_steps`` says, so that a run cut short
    follows the same curve.
    """
    optimizer = recipe.optimizer
    end = optimizer.lr_decay
    tail = optimizer.lr_wsd_decay
    return Schedule(
        max_lr=optimizer.lr,
        min_lr=optimizer.min_lr,
        warmup_tokens=_tokens_from_start(optimizer.lr_warmup, stages),
        decay_end_tokens=_tokens_from_start(end, stages) if end else _end_token(stages),
        wsd_decay_tokens=tail.in_tokens(stages[-1].tokens_per_step) if tail else 0,
        decay_style=optimizer.lr_decay_style,
        wsd_decay_style=optimizer.lr_wsd_decay_style,
    )


def _end_token(stages: Sequence[Stage]) -> int:
    return stages[-1].first_token + stages[-1].steps * stages[-1].tokens_per_step


def _tokens_from_start(duration: Duration, stages: Sequence[Stage]) -> int:
    """Tokens after ``duration`` from the start of the run; the last stage is thought to go on for ever."""
    if duration.unit == "tokens":
        return duration.in_tokens(1)
    steps = duration.in_steps(1)
    stage = next((stage for stage in stages if steps < stage.end_step), stages[-1])
    return stage.first_token + (steps - stage.first_step) * stage.tokens_per_step
