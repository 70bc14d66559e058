"""The learning rate as a function of tokens seen: warm-up, then WSD, cosine, linear or constant."""

from __future__ import annotations

import math

from nemotron3_megatron.config.run import Schedule


def learning_rate(schedule: Schedule, tokens: int) -> float:
    """Learning rate of the step that starts after ``tokens`` tokens.

    The WSD tail ends at ``decay_end_tokens`` and has the shapes of Megatron-Core's scheduler
    (core/optimizer_param_scheduler.py): with r the share of the tail done, minus_sqrt is 1 - sqrt(r). Stages with a
    rate of their own have that; the schedule counts their tokens on.
    """
    for part in schedule.constant:
        if part.first_token <= tokens < part.end_token:
            return part.lr
    low, high = schedule.min_lr, schedule.max_lr
    if tokens < schedule.warmup_tokens:
        return high * tokens / schedule.warmup_tokens
    if schedule.decay_style == "constant":
        return high
    if tokens >= schedule.decay_end_tokens:
        return low
    if schedule.decay_style == "WSD":
        tail_start = schedule.decay_end_tokens - schedule.wsd_decay_tokens
        done = max(0.0, (tokens - tail_start) / schedule.wsd_decay_tokens)
        return low + (high - low) * _remaining(schedule.wsd_decay_style, done)
    done = (tokens - schedule.warmup_tokens) / (schedule.decay_end_tokens - schedule.warmup_tokens)
    return low + (high - low) * _remaining(schedule.decay_style, done)


def _remaining(style: str, done: float) -> float:
    """Share of the decay still ahead after the share ``done``."""
    if style == "minus_sqrt":
        return 1.0 - math.sqrt(done)
    if style == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * done))
    if style == "linear":
        return 1.0 - done
    raise ValueError(f"unknown decay style {style!r}")
