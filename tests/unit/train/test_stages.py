"""Boundaries between stages: when a start must end, and reports that a kill neither doubles nor tears."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from nemotron3_megatron.config import Recipe, compose, resolve
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ParallelConfig, StageConfig
from nemotron3_megatron.train.callbacks.base import StepEvent, Stop
from nemotron3_megatron.train.callbacks.samples import drop_lines_after
from nemotron3_megatron.train.optimizer import Update
from nemotron3_megatron.train.stages import BOUNDARIES, Boundaries, check_continues, warn_of_rate
from nemotron3_megatron.train.step import StepResult


def curriculum(run_dir: Path) -> Recipe:
    """Two stages of two steps in one layout, then one in another."""
    plain = StageConfig(tokens=Duration(2, "steps"), seq_length=64, batch_tokens=1024)
    other = replace(plain, seq_length=256, parallel=ParallelConfig(cp=2))
    words = ["recipe=tiny", "optimizer.lr_decay_style=constant", "~optimizer.lr_wsd_decay", "~optimizer.lr_warmup"]
    return replace(compose(words)[0], run_dir=str(run_dir), stages={"one": plain, "two": plain, "three": other})


def feed(callback: Boundaries, recipe: Recipe, steps: range) -> None:
    run = resolve(recipe, 2, step=steps[0])
    for step in steps:
        result = StepResult((5.0 - step, 5.0), Update(True, 0.5))
        stage = run.stage_at(step)
        callback.step_done(StepEvent(step + 1, run.tokens_at(step + 1), stage, 1e-3, result, 0.1, False))


def boundaries(recipe: Recipe, step: int, last: dict[str, object] | None) -> Boundaries:
    drawn = {"64": {"train": 16 * step}}
    return Boundaries(resolve(recipe, 2, step=step), lambda: drawn, last, Console(quiet=True))


def test_a_start_ends_where_the_layout_changes(tmp_path: Path) -> None:
    first = boundaries(curriculum(tmp_path), 0, None)
    assert [first.wants_stop(step) for step in range(1, 6)] == [None, None, None, Stop.NEXT_LAYOUT, Stop.NEXT_LAYOUT]
    assert first.wants_stop(6) is None  # the target
    last = boundaries(curriculum(tmp_path), 4, None)
    assert [last.wants_stop(step) for step in (5, 6)] == [None, None]


def test_reports_reach_over_starts_and_are_not_doubled(tmp_path: Path) -> None:
    recipe = curriculum(tmp_path)
    first = boundaries(recipe, 0, None)
    feed(first, recipe, range(0, 2))
    saved = json.loads(json.dumps(first.last_step))
    feed(first, recipe, range(2, 3))  # reported, then killed before the next checkpoint
    again = boundaries(recipe, 2, saved)
    feed(again, recipe, range(2, 4))
    third = boundaries(recipe, 4, json.loads(json.dumps(again.last_step)))
    feed(third, recipe, range(4, 6))
    reports = [json.loads(line) for line in (tmp_path / BOUNDARIES).read_text().splitlines()]
    assert [(r["before"]["stage"], r["after"]["stage"], r["step"]) for r in reports] == [
        ("one", "two", 3),
        ("two", "three", 5),
    ]
    change = reports[1]
    assert (change["before"]["layout"], change["after"]["layout"]) == ("tp1 cp1 pp1 ep2 dp2", "tp1 cp2 pp1 ep1 dp1")
    assert (change["before"]["tokens"], change["after"]["tokens"]) == (4096, 5120)
    assert (change["before"]["seq_length"], change["after"]["seq_length"]) == (64, 256)


def test_stages_that_count_other_tokens_until_a_checkpoint_are_refused(tmp_path: Path) -> None:
    """A batch changed for steps that are done would move the run along its schedule; later ones may change."""
    recipe = curriculum(tmp_path)
    done = StageConfig(tokens=Duration(1, "steps"), seq_length=64, batch_tokens=1024)
    larger = replace(done, batch_tokens=2048)
    source = tmp_path / "step_00000001"
    for stages, fits in (({"one": done, "rest": larger}, True), ({"one": larger}, False), ({"rest": larger}, False)):
        run = resolve(replace(recipe, stages=stages), 2)
        with nullcontext() if fits else pytest.raises(UserError, match=r"seen 1,024 tokens .* count 2,048 "):
            check_continues(run, source, 1, 1024)


def test_a_learning_rate_that_jumps_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    recipe = curriculum(tmp_path)
    state = {"last_step": {"step": 3, "lr": recipe.optimizer.lr}}
    for harmless in ({"last_step": None}, {}, state):
        warn_of_rate(resolve(recipe, 2), harmless)
    assert not caplog.records
    slower = replace(recipe, optimizer=replace(recipe.optimizer, lr=recipe.optimizer.lr / 2))
    warn_of_rate(resolve(slower, 2), state)
    assert "that of step 3 was 0.003, and would be 0.0015" in caplog.text


def test_a_torn_line_is_dropped_with_those_after_a_step(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    drop_lines_after(path, 3)
    assert not path.exists()
    path.write_text("".join(f'{{"step": {step}}}\n' for step in (1, 2, 3, 4)) + '{"step": 5')
    drop_lines_after(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3}\n'
