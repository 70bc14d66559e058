from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemotron3_megatron.config import check_data, compose, make_run_dir, planned_world, resolve
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import Recipe


def test_stages_follow_each_other_on_both_axes(tiny: Recipe) -> None:
    first = tiny.stages["main"]
    second = replace(first, seq_length=512, tokens=Duration(10, "steps"))
    run = resolve(replace(tiny, stages={"short": first, "long": second}), 2)
    short, long = run.stages
    assert (short.first_step, short.steps, short.tokens_per_step) == (0, 293, 4096)  # ceil(1,200,000 / 4096)
    assert (long.first_step, long.first_token, long.tokens_per_step) == (293, 293 * 4096, 8192)
    assert run.total_steps == 303
    assert run.stage_at(293) is long
    assert run.tokens_at(294) == 293 * 4096 + 8192
    assert run.schedule.decay_end_tokens == 293 * 4096 + 10 * 8192


def test_max_steps_cuts_the_run_and_not_the_schedule(tiny: Recipe) -> None:
    cut, whole = resolve(replace(tiny, max_steps=7), 2), resolve(tiny, 2)
    assert cut.total_steps == 7
    assert cut.schedule == whole.schedule
    assert cut.stages == whole.stages


def test_warmup_in_steps_crosses_stages(tiny: Recipe) -> None:
    first = replace(tiny.stages["main"], tokens=Duration(10, "steps"))
    second = replace(first, seq_length=512, tokens=Duration(500, "steps"))
    optimizer = replace(tiny.optimizer, lr_warmup=Duration(15, "steps"), lr_wsd_decay=Duration(20, "steps"))
    run = resolve(replace(tiny, stages={"a": first, "b": second}, optimizer=optimizer), 2)
    assert run.schedule.warmup_tokens == 10 * 4096 + 5 * 8192
    assert run.schedule.wsd_decay_tokens == 20 * 8192


def test_defaults_that_resolution_fills(tiny: Recipe) -> None:
    run = resolve(replace(tiny, parallel=replace(tiny.parallel, tp=2)), 2)
    assert run.run_dir == Path("runs/tiny")
    assert run.layout.sequence_parallel


def test_only_origins_that_differ_are_recorded() -> None:
    recipe, origins = compose(["recipe=tiny", "seed=1234", "max_steps=5"])
    keys = {origin.key for origin in resolve(recipe, 2, origins).origins}
    assert "max_steps" in keys
    assert "seed" not in keys  # set, and equal to its default


def test_a_run_directory_that_cannot_be_written_is_named(tiny: Recipe, tmp_path: Path) -> None:
    run = resolve(tiny, 2)
    (tmp_path / "file").touch()
    for impossible in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/run")):
        with pytest.raises(UserError, match=f"run_dir={impossible}: cannot be made"):
            make_run_dir(replace(run, run_dir=impossible))
    for _ in range(2):  # each rank, each start
        make_run_dir(replace(run, run_dir=tmp_path / "a b" / "ü"))


def test_training_needs_data_that_exists(tiny: Recipe, tmp_path: Path) -> None:
    run = resolve(tiny, 2)
    with pytest.raises(UserError, match="nothing to train on"):
        check_data(replace(run, data=replace(run.data, sources={})))
    source = replace(run.data.sources["train"], path=str(tmp_path / "text"))
    data = replace(run.data, sources={"train": source}, validation={})
    (tmp_path / "text.bin").touch()
    with pytest.raises(UserError, match=r"text\.idx does not exist"):
        check_data(replace(run, data=data))
    (tmp_path / "text.idx").touch()
    check_data(replace(run, data=data))


@pytest.mark.parametrize(
    ("overrides", "ranks"),
    [([], 2), (["stage=phase2"], 2), (["stages.phase1.world_size=3"], 3), (["~world_size"], 1), (["world_size=0"], 0)],
)
def test_a_plan_is_for_the_world_of_its_stage(overrides: list[str], ranks: int) -> None:
    """0 is refused by a rule, which could not tell it from nothing otherwise."""
    assert planned_world(compose(["recipe=tiny_curriculum", *overrides])[0]) == ranks
