"""Decisions about steps that look bad."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.recipe import ResilienceConfig
from nemotron3_megatron.telemetry.incidents import IncidentLog, read_incidents
from nemotron3_megatron.train.callbacks.base import Progress, StepEvent
from nemotron3_megatron.train.callbacks.spikes import BadStepsError, StepJudge, compare
from nemotron3_megatron.train.optimizer import Update
from nemotron3_megatron.train.step import StepResult

OPTIONS = ResilienceConfig(spike_window_steps=4, spike_nats=1.0, rerun_suspect_steps=False)
GOOD = Update(True, 1.0)
NAN = Update(False, math.nan, ("a.weight", "b.weight"))


class Run:
    """Steps through a judge as the loop and ``train_step`` do."""

    def __init__(self, options: ResilienceConfig, folder: Path) -> None:
        self.progress = Progress()
        self.folder = folder
        self.judge = StepJudge(options, self.rollback, IncidentLog(folder, writes=True))
        self.judge.started(self.progress)
        recipe, origins = compose(["recipe=tiny"])
        self.stage = resolve(recipe, 2, origins).stages[0]

    def rollback(self, step: int) -> int:
        return max(step - 3, 0)

    def step(self, loss: float, update: Update = GOOD) -> bool:
        """Whether weights moved."""
        self.judge.before_step(self.progress.step + 1)
        reason = self.judge.refuse((loss,)) if update.applied else ""
        result = StepResult((loss,), Update(False, 1.0, reason=reason) if reason else update)
        result = self.judge.reconsider(result, lambda: pytest.fail("computed again"))
        self.progress.step += 1
        event = StepEvent(
            step=self.progress.step, tokens=0, stage=self.stage, lr=0.0, result=result, step_time_s=1.0, last=False
        )
        self.judge.step_done(event)
        return result.update.applied

    def kinds(self) -> list[str]:
        return [str(incident.kind) for incident in read_incidents(self.folder)][1:]


def test_a_spike_is_measured_against_the_median(tmp_path: Path) -> None:
    run = Run(replace(OPTIONS, spike="skip"), tmp_path)
    assert run.step(99.0), "nothing is known yet"
    assert [run.step(loss) for loss in (5.0, 5.0, 5.0, 5.0, 5.9)] == [True] * 5
    assert [run.step(loss) for loss in (6.1, 5.0)] == [False, True]
    assert run.kinds() == ["spike"]


def test_ignored_spikes_are_recorded(tmp_path: Path) -> None:
    run = Run(OPTIONS, tmp_path)
    assert all(run.step(loss) for loss in (5.0, 5.0, 9.0))
    assert run.kinds() == ["spike"]


def test_a_loss_that_stays_high_ends_the_run(tmp_path: Path) -> None:
    run = Run(replace(OPTIONS, spike="skip", spike_limit=2), tmp_path)
    for loss in (5.0, 5.0, 9.0, 9.0):
        run.step(loss)
    with pytest.raises(BadStepsError, match=r"3 steps in a row were refused.*9\.0000"):
        run.step(9.0)


def test_steps_that_are_not_finite_are_counted_in_a_row(tmp_path: Path) -> None:
    run = Run(replace(OPTIONS, non_finite_limit=2), tmp_path)
    for update in (NAN, NAN, GOOD, NAN, NAN):
        run.step(5.0, update)
    with pytest.raises(BadStepsError, match="2 parameters, first a"):
        run.step(5.0, NAN)


def test_rollbacks_are_limited_and_the_window_stays(tmp_path: Path) -> None:
    """What was a spike before a rollback is one after it."""
    run = Run(replace(OPTIONS, spike="rollback", rollback_limit=1), tmp_path)
    for loss in (5.0, 5.0, 5.0, 5.0, 9.0):
        run.step(loss)
    assert run.progress.step == 2
    assert run.kinds() == ["spike", "rollback"]
    with pytest.raises(BadStepsError, match="bad again after 1 rollbacks"):
        run.step(9.0)


def test_fail_tolerates_none(tmp_path: Path) -> None:
    with pytest.raises(BadStepsError, match="does not tolerate"):
        Run(replace(OPTIONS, non_finite="fail"), tmp_path).step(5.0, NAN)


def test_a_good_step_is_not_computed_again(tmp_path: Path) -> None:
    assert Run(replace(OPTIONS, rerun_suspect_steps=True), tmp_path).step(5.0)


def test_passing_faults_are_limited(tmp_path: Path) -> None:
    run = Run(replace(OPTIONS, rerun_suspect_steps=True, transient_limit=1), tmp_path)
    bad, good = StepResult((math.nan,), NAN), StepResult((5.0,), GOOD)
    run.judge.before_step(1)
    assert run.judge.reconsider(bad, lambda: good) == good
    with pytest.raises(BadStepsError, match="suspect hardware"):
        run.judge.reconsider(bad, lambda: good)


@pytest.mark.parametrize(
    ("second", "verdict"),
    [
        (StepResult((5.0,), GOOD), "transient"),
        (StepResult((math.nan,), NAN), "reproducible"),
        (StepResult((math.inf,), NAN), "not bitwise"),
    ],
)
def test_what_a_second_computation_says(second: StepResult, verdict: str) -> None:
    assert compare(StepResult((math.nan,), NAN), second) == verdict
