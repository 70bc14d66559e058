"""Stages in closed form against walking over every step; layouts and precisions by stage; the rules of both."""

from __future__ import annotations

import cProfile
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.compose import RECIPES
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.parts import stage_in_force
from nemotron3_megatron.config.recipe import LengthConfig, ParallelConfig, RampupConfig, Recipe, StageConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import from_json, to_json
from nemotron3_megatron.config.stage import recurring_order
from nemotron3_megatron.train.schedule import learning_rate

TINY = compose(["recipe=tiny", "optimizer.lr_decay_style=constant", "~optimizer.lr_wsd_decay", "~optimizer.lr_warmup"])[
    0
]
CP2 = ParallelConfig(cp=2)


def with_stages(**stages: StageConfig) -> Recipe:
    return replace(TINY, stages=stages)


def stage(tokens: str = "64 steps", **fields: object) -> StageConfig:
    given = {"seq_length": 64, "batch_tokens": 1024, **fields}
    return StageConfig(tokens=Duration.parse(tokens), **given)  # type: ignore[arg-type]


@st.composite
def curricula(draw: st.DrawFn) -> Recipe:
    """One to three stages with every mixture of lengths and ramp-ups whose batches are whole."""
    stages = {}
    for name in draw(st.sampled_from([("a",), ("a", "b"), ("a", "b", "c")])):
        others = {}
        for other, share in zip("xy", draw(st.sampled_from([(), (0.5,), (0.08,), (0.25, 0.125)])), strict=False):
            own = draw(st.sampled_from([None, 512, 2048]))
            others[other] = LengthConfig(seq_length=draw(st.sampled_from([16, 256])), share=share, batch_tokens=own)
        start = draw(st.sampled_from([None, 512, 1024]))
        amount = (
            f"{draw(st.integers(1, 90))} steps" if draw(st.booleans()) else f"{draw(st.integers(1, 90_000))} tokens"
        )
        over = Duration.parse(draw(st.sampled_from(["7 steps", "20 steps", "9000 tokens", "1 tokens"])))
        stages[name] = stage(
            amount,
            batch_tokens=2048,
            other_lengths=others,
            batch_rampup=None if start is None else RampupConfig(start_tokens=start, increment_tokens=512, over=over),
        )
    return replace(TINY, stages=stages)


@settings(max_examples=60, deadline=None)
@given(recipe=curricula())
def test_closed_form_equals_walking_over_every_step(recipe: Recipe) -> None:
    run = resolve(recipe, 2)
    tokens = 0
    for each in run.stages:
        assert each.first_token == tokens
        counted = {shape: 0 for shape, _ in each.step_counts()}
        for step in range(each.first_step, each.end_step):
            shape = run.shape_at(step)
            assert run.stage_at(step) is each
            assert run.tokens_at(step) == tokens
            assert shape.tokens_per_step == shape.seq_length * shape.global_batch_size
            assert shape.global_batch_size == shape.micro_batch_size * run.layout.dp * shape.num_microbatches
            counted[shape] += 1
            tokens += shape.tokens_per_step
        assert {shape: count for shape, count in each.step_counts() if count} == {s: c for s, c in counted.items() if c}
        assert each.tokens == tokens - each.first_token
        wanted = recipe.stages[each.name].tokens
        if wanted.unit == "steps":
            assert each.steps == wanted.value
        else:  # the fewest steps that cover it
            assert each.tokens >= wanted.value > each.tokens_at(each.end_step - 1) - each.first_token
    assert run.tokens_at(run.total_steps) == tokens
    assert from_json(to_json(run)) == run


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5))
def test_every_round_has_the_exact_shares_evenly_spread(weights: list[int]) -> None:
    total = sum(weights)
    order = recurring_order(tuple(Fraction(weight, total) for weight in weights))
    assert total % len(order) == 0
    for index, weight in enumerate(weights):
        assert Fraction(order.count(index), len(order)) == Fraction(weight, total)
        for places in range(1, len(order) + 1):  # never a whole step more than its share: it would come too early
            assert order[:places].count(index) - Fraction(places * weight, total) < 1


def test_alternating_and_ultras_92_to_8() -> None:
    run = resolve(with_stages(a=stage(other_lengths={"short": LengthConfig(seq_length=16)})), 2)
    assert [run.shape_at(step).seq_length for step in range(5)] == [64, 16, 64, 16, 64]
    assert {run.shape_at(step).tokens_per_step for step in range(5)} == {1024}
    run = resolve(
        with_stages(a=stage("1000 steps", other_lengths={"short": LengthConfig(seq_length=16, share=0.08)})), 2
    )
    lengths = [run.shape_at(step).seq_length for step in range(1000)]
    assert lengths.count(16) == 80
    assert [step for step in range(25) if lengths[step] == 16] == [6, 18]


def test_a_ramp_up_takes_equal_parts_of_its_tokens() -> None:
    rampup = RampupConfig(start_tokens=256, increment_tokens=256, over=Duration.parse("12288 tokens"))
    run = resolve(with_stages(a=stage("100 steps", batch_rampup=rampup)), 2)
    sizes = [run.shape_at(step).tokens_per_step for step in range(100)]
    # 12288 / 3 = 4096 tokens for each of 256, 512 and 768: 16, 8 and ceil(5.33) steps.
    assert sizes == [256] * 16 + [512] * 8 + [768] * 6 + [1024] * 70
    assert run.stages[0].tokens_per_step == 1024


def test_intervals_in_tokens_follow_each_stages_batch() -> None:
    """1,024 tokens in each of 4 steps, then 4,096: multiples of 3,072 are passed at 3,072 and from 8,192 on."""
    run = resolve(with_stages(a=stage("4 steps"), b=stage("4 steps", batch_tokens=4096)), 2)
    assert [run.tokens_at(step) for step in (0, 4, 8)] == [0, 4096, 20480]
    assert [step for step in range(1, 9) if run.is_due(Duration.parse("3072 tokens"), step)] == [3, 5, 6, 7, 8]
    assert [step for step in range(1, 9) if run.is_due(Duration.parse("3 steps"), step)] == [3, 6]
    assert not any(run.is_due(None, step) for step in range(1, 9))


def test_a_million_steps_cost_nothing() -> None:
    """Any step of Ultra's size is found without walking there: by a few calls, not by one for each step before it."""
    rampup = RampupConfig(start_tokens=512, increment_tokens=512, over=Duration.parse("1B tokens"))
    others = {"short": LengthConfig(seq_length=16, share=0.08)}
    run = resolve(
        with_stages(
            a=stage("1000M tokens", other_lengths=others, batch_rampup=rampup),
            b=stage("2000000 steps", other_lengths=others),
        ),
        2,
    )
    assert run.total_steps > 3_000_000
    steps = range(0, run.total_steps, run.total_steps // 1000)
    with cProfile.Profile() as profile:
        for step in steps:
            run.tokens_at(step)
            run.shape_at(step)
    calls = sum(entry.callcount for entry in profile.getstats())
    assert calls < 100 * len(steps), "24 each"


def test_a_stage_with_its_own_rate_lies_beside_the_schedule() -> None:
    optimizer = replace(
        TINY.optimizer,
        lr_warmup=Duration.parse("4 steps"),
        lr_wsd_decay=Duration.parse("16 steps"),
        lr_decay_style="WSD",
    )
    recipe = replace(
        with_stages(one=stage("32 steps"), two=stage("32 steps"), long=stage("8 steps", lr=1e-4)), optimizer=optimizer
    )
    run = resolve(recipe, 2)
    rates = [learning_rate(run.schedule, run.tokens_at(step)) for step in range(run.total_steps)]
    assert rates[64:] == [1e-4] * 8
    assert rates[4:49] == [TINY.optimizer.lr] * 45  # the tail spans the last 16 of the 64 scheduled steps
    low, high = TINY.optimizer.min_lr, TINY.optimizer.lr
    assert rates[52] == pytest.approx(low + (high - low) * 0.5)  # 1 - sqrt(4/16)
    assert run.schedule.decay_end_tokens == 64 * 1024


def two_layouts() -> Recipe:
    return with_stages(one=stage("4 steps"), two=stage("4 steps"), long=stage("8 steps", parallel=CP2))


def test_a_run_is_resolved_for_the_stage_in_force() -> None:
    first, last = resolve(two_layouts(), 2), resolve(two_layouts(), 2, step=8)
    assert (first.layout.cp, first.layout.ep, last.layout.cp, last.layout.ep) == (1, 2, 2, 1)
    assert [stage.name for stage in first.own_stages] == ["one", "two"]
    assert [stage.name for stage in last.own_stages] == ["long"]
    assert first.stages == last.stages
    assert first.for_stage(first.stages[2]).layout == last.layout
    assert [stage.num_microbatches for stage in first.stages] == [8, 8, 16]
    assert stage_in_force(two_layouts(), 7) == "two"
    assert resolve(replace(two_layouts(), stage="long"), 2).layout == last.layout


def test_a_start_trains_one_set_of_parameters() -> None:
    run = resolve(with_stages(all=stage("4 steps"), router=stage("4 steps", trainable=("router",))), 2)
    assert [each.name for each in run.own_stages] == ["all"]
    assert run.for_stage(run.stages[1]).trainable == ("router",)
    assert run.stages[0].layout == run.stages[1].layout
    with pytest.raises(UserError, match=r"stages\.a\.trainable"):
        resolve(with_stages(a=stage(trainable=("(",))), 2)


def test_the_world_may_differ_between_stages() -> None:
    recipe = with_stages(one=stage("4 steps"), long=stage("8 steps", parallel=replace(CP2, cp=2, tp=2), world_size=4))
    first = resolve(recipe, 2)
    assert [layout.world_size for layout in (first.layout, first.stages[1].layout) if layout] == [2, 4]
    assert resolve(recipe, 4, step=4).layout.world_size == 4
    with pytest.raises(UserError) as caught:
        resolve(recipe, 2, step=4)
    message = str(caught.value)
    assert "stages.long.parallel.cp=2" in message or "stages.long.parallel.tp=2" in message
    assert "stage long wants world_size=4" in message


@pytest.mark.parametrize(
    ("stages", "named", "nearest"),
    [
        ({"a": stage(batch_tokens=None)}, "stages.a.global_batch_size", "batch_tokens"),
        ({"a": stage(global_batch_size=4)}, "stages.a.global_batch_size=4", "batch_tokens=null"),
        ({"a": stage(blend="phase1")}, "stages.a.blend=phase1", "data.blends.phase1"),
        ({"a": stage(batch_tokens=1000)}, "stages.a.seq_length", "stages.a.batch_tokens=1024"),
        ({"a": stage(other_lengths={"x": LengthConfig(seq_length=48)})},
         "stages.a.other_lengths.x.seq_length=48", "=32"),
        ({"a": stage(other_lengths={"x": LengthConfig(seq_length=16, share=1.0)})},
         "stages.a.other_lengths.x.share=1", "0.08"),
        ({"a": stage(batch_rampup=RampupConfig(start_tokens=256, increment_tokens=500, over=Duration(9, "steps")))},
         "stages.a.batch_rampup.increment_tokens=500", "=384"),
        ({"a": stage(batch_rampup=RampupConfig(start_tokens=2048, increment_tokens=5, over=Duration(9, "steps")))},
         "stages.a.batch_rampup.start_tokens=2048", "=1019"),
        ({"a": stage(lr=-1.0)}, "stages.a.lr=-1", "null"),
        ({"a": stage(), "b": stage(parallel=ParallelConfig(cp=3))}, "stages.b.parallel.cp=3", "stages.b."),
        ({"a": stage(), "b": stage(seq_length=66, batch_tokens=1056, parallel=CP2)},
         "stages.b.seq_length=66", "stages.b.seq_length=48 or stages.b.parallel.cp=1"),
        ({"a": stage(tokens="0 steps"), "b": stage(parallel=CP2)}, "stages.a.tokens=0 steps", "100 steps"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(stages: dict[str, StageConfig], named: str, nearest: str) -> None:
    with pytest.raises(UserError) as caught:
        resolve(with_stages(**stages), 2)
    assert named in str(caught.value)
    assert nearest in str(caught.value)


def test_a_blend_is_of_sources_that_exist() -> None:
    recipe = replace(with_stages(a=stage(blend="one")), data=replace(TINY.data, blends={"one": {"trian": 1.0}}))
    with pytest.raises(UserError, match=r"data\.blends\.one\.trian"):
        resolve(recipe, 2)


def test_a_stage_takes_layout_and_precision_from_files(write_recipe: Callable[[str, str], Path]) -> None:
    text = """# @package _global_
defaults:
  - tiny
  - /parallel@stages.long.parallel: single
  - /precision@stages.long.precision: nemotron3_nvfp4
  - _self_
stages:
  long:
    tokens: 4 steps
    seq_length: 256
    batch_tokens: 4096
    parallel: {cp: 2}
    precision: {dtype: fp32}
model: {mamba_num_heads: 32, mamba_head_dim: 8}
"""
    tree = write_recipe("recipe/two.yaml", text)
    recipe, origins = compose(["recipe=two"], tree)
    last = resolve(recipe, 2, origins, step=293)
    assert (last.precision.name, last.layout.cp, resolve(recipe, 2, origins).precision.name) == (
        "nemotron3_nvfp4",
        2,
        "fp32",
    )
    place = {origin.key: origin.place for origin in origins}
    assert place["stages.long.parallel.cp"] == "recipes/recipe/two.yaml:12"
    with pytest.raises(UserError, match=r"nvfp5.*two\.yaml:5"):
        compose(["recipe=two"], write_bad(tree, text))


def write_bad(tree: Path, text: str) -> Path:
    (tree / "recipe/two.yaml").write_text(text.replace("nemotron3_nvfp4", "nvfp5"))
    return tree


def one_run() -> Run:
    return resolve(TINY, 2)


def test_a_plain_recipe_has_neither_spans_nor_layouts_by_stage() -> None:
    (main,) = one_run().stages
    assert (main.spans, main.layout, main.parallel, main.precision) == ((), None, None, None)
    assert one_run().own_stages == one_run().stages
    assert (RECIPES / "recipe/tiny.yaml").is_file()
