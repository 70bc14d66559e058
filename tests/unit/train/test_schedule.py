"""The learning rate against Megatron-Core's own scheduler, the published Super schedule, and its properties."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Schedule
from nemotron3_megatron.train.schedule import learning_rate

HIGH, LOW = 4.5e-4, 4.5e-6
SHAPES = [
    ("WSD", "minus_sqrt"),
    ("WSD", "linear"),
    ("WSD", "cosine"),
    ("cosine", "minus_sqrt"),
    ("linear", "minus_sqrt"),
    ("constant", "minus_sqrt"),
]


def megatron_rate(schedule: Schedule, tokens: int) -> float:
    """The rate by Megatron-Core's scheduler, which counts in any unit: here tokens."""
    scheduler = OptimizerParamScheduler(
        torch.optim.SGD([torch.zeros(1)], lr=1.0),
        init_lr=0.0,
        max_lr=schedule.max_lr,
        min_lr=schedule.min_lr,
        lr_warmup_steps=schedule.warmup_tokens,
        lr_decay_steps=schedule.decay_end_tokens,
        lr_decay_style=schedule.decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=schedule.wsd_decay_tokens,
        lr_wsd_decay_style=schedule.wsd_decay_style,
    )
    scheduler.step(tokens)
    return float(scheduler.optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("warmup", [0, 7, 1000])
@pytest.mark.parametrize(("style", "tail_style"), SHAPES)
def test_equals_megatron(style: str, tail_style: str, warmup: int) -> None:
    schedule = Schedule(
        max_lr=HIGH,
        min_lr=LOW,
        warmup_tokens=warmup,
        decay_end_tokens=10_000,
        wsd_decay_tokens=2_500,
        decay_style=style,
        wsd_decay_style=tail_style,
    )
    edges = [0, 1, warmup - 1, warmup, warmup + 1, 7_499, 7_500, 7_501, 9_999, 10_000, 10_001, 50_000]
    for tokens in sorted({t for t in edges if t >= 0} | set(range(0, 12_000, 331))):
        # The same formulas in float64, in another order of operations: a few units in the last place.
        assert learning_rate(schedule, tokens) == pytest.approx(megatron_rate(schedule, tokens), rel=1e-13), tokens


def test_super_follows_its_published_schedule() -> None:
    """Super report: 4.5e-4 to 4.5e-6, 200B tokens of warm-up, minus-sqrt over the last 5T (24.975T with the script's
    3,048,706,055 sequences of 8192)."""
    recipe, origins = compose(["recipe=super_bf16"])
    assert recipe.world_size is not None
    schedule = resolve(recipe, recipe.world_size, origins).schedule
    end = 3_048_706_055 * 8192
    tail = 610_351_563 * 8192
    points = {
        0: 0.0,
        100 * 10**9: 2.25e-4,
        10 * 10**12: 4.5e-4,
        end - 3 * tail // 4: 4.5e-6 + 4.455e-4 * (1 - 1 / 2),
        end - tail // 2: 4.5e-6 + 4.455e-4 * (1 - math.sqrt(1 / 2)),
        25 * 10**12: 4.5e-6,
    }
    for tokens, rate in points.items():
        # 1e-6: the warm-up is 200,000,004,096 tokens, a whole number of sequences.
        assert learning_rate(schedule, tokens) == pytest.approx(rate, rel=1e-6), tokens


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    warmup = draw(st.integers(0, 10**13))
    length = draw(st.integers(1000, 3 * 10**13))
    style, tail_style = draw(st.sampled_from(SHAPES))
    high = draw(st.floats(1e-6, 1.0))
    return Schedule(
        max_lr=high,
        min_lr=high * draw(st.floats(0, 1)),
        warmup_tokens=warmup,
        decay_end_tokens=warmup + length,
        wsd_decay_tokens=draw(st.integers(1000, length)),
        decay_style=style,
        wsd_decay_style=tail_style,
    )


@given(schedule=schedules(), data=st.data())
def test_stays_in_range_and_never_rises_after_warmup(schedule: Schedule, data: st.DataObject) -> None:
    end = schedule.decay_end_tokens
    tokens = sorted(data.draw(st.lists(st.integers(0, 2 * end), min_size=2, max_size=20)))
    rates = [learning_rate(schedule, t) for t in tokens]
    slack = 1e-15 * schedule.max_lr  # rounding of low + (high - low) * share
    assert all(0 <= rate <= schedule.max_lr + slack for rate in rates)
    for (before, first), (_, second) in itertools.pairwise(zip(tokens, rates, strict=True)):
        assert before < schedule.warmup_tokens or second <= first + slack
    final = schedule.max_lr if schedule.decay_style == "constant" else schedule.min_lr
    assert learning_rate(schedule, end) == learning_rate(schedule, 3 * end) == final


@given(schedule=schedules(), data=st.data())
def test_is_continuous(schedule: Schedule, data: st.DataObject) -> None:
    """One token more changes the rate by at most the steepest slope there is.

    That is 1 / warm-up, pi/2 / length (cosine), or sqrt(1 / length) at the start of a minus-sqrt tail, each times
    the peak; 1e-12 covers rounding where token counts reach 1e13.
    """
    end, tail = schedule.decay_end_tokens, schedule.wsd_decay_tokens
    steepest = max(
        1 / max(schedule.warmup_tokens, 1),
        math.pi / 2 / min(tail, end - schedule.warmup_tokens),
        math.sqrt(1 / tail),
    )
    edges = [schedule.warmup_tokens, end - tail, end]
    place = data.draw(st.sampled_from(edges) | st.integers(1, 2 * end))
    for tokens in (place - 1, place):
        change = abs(learning_rate(schedule, max(tokens, 0) + 1) - learning_rate(schedule, max(tokens, 0)))
        assert change <= schedule.max_lr * (steepest + 1e-12)
