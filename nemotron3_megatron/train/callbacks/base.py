"""Hooks around the step. Everything that is not the step itself is a callback."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from nemotron3_megatron.config.run import Stage
from nemotron3_megatron.train.step import StepResult


class Stop(Enum):
    """Why the loop should end before its last step."""

    PREEMPTED = "preempted"
    """Saved, and wants to be started again (exit code 75)."""
    NEXT_LAYOUT = "next layout"
    """The next stage has another layout or precision: saved, and wants to be started again (exit code 75)."""


@dataclass(slots=True)
class Progress:
    """How far the run is; the loop is its one writer."""

    step: int = 0
    """Optimizer steps done."""


@dataclass(frozen=True, slots=True)
class StepEvent:
    """What callbacks learn after a step."""

    step: int
    """Optimizer steps done, this one included."""
    tokens: int
    stage: Stage
    lr: float
    result: StepResult
    step_time_s: float
    last: bool
    """The run's last step. False where a stop ends this start: a preempted run has no time to lose."""


class Callback:
    """Does nothing; subclasses override the hooks they need. All ranks call every hook, in the same order."""

    def started(self, progress: Progress) -> None:
        """Before the first step of this start."""

    def before_step(self, step: int) -> None:
        """Before each optimizer step; the first is 1."""

    def step_done(self, event: StepEvent) -> None:
        """After each optimizer step."""

    def wants_stop(self, step: int) -> Stop | None:
        """Whether to end after this step; the answer must be the same on every rank."""
        return None

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        """After the last step of this start, also when it was stopped; called in reverse order of callbacks."""
