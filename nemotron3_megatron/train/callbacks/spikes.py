"""Steps with gradients that are not finite or a loss that spikes: compute again, skip, roll back, or end the run."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median
from typing import Literal

from nemotron3_megatron.checkpoint import rng
from nemotron3_megatron.config.recipe import ResilienceConfig
from nemotron3_megatron.telemetry.incidents import IncidentLog
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.step import StepResult

Verdict = Literal["transient", "reproducible", "not bitwise"]


class BadStepsError(RuntimeError):
    """More bad steps than the recipe tolerates."""


class StepJudge(Callback):
    """Judges every step before its update, and decides what follows a refused one; all ranks decide alike.

    Stands last among the callbacks: after a rollback the others must not see the step that was undone.
    """

    def __init__(self, options: ResilienceConfig, rollback: Callable[[int], int], incidents: IncidentLog) -> None:
        """Prepare.

        Args:
            options: policies and limits.
            rollback: goes back from that step to an earlier checkpoint and returns the optimizer steps then done.
            incidents: where decisions are recorded.
        """
        self._options = options
        self._rollback = rollback
        self._incidents = incidents
        self._losses: deque[float] = deque(maxlen=options.spike_window_steps)
        self._progress = Progress()
        self._generators: dict[str, object] | None = None
        self._in_a_row = 0
        self._transients = 0
        self._rollbacks = 0
        self._note = ""

    def started(self, progress: Progress) -> None:
        self._progress = progress
        self._incidents.add("start", progress.step)

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        self._incidents.add("end", progress.step, "target reached" if stop is None else stop.value)

    def before_step(self, step: int) -> None:
        self._note = ""
        if self._options.rerun_suspect_steps:
            self._generators = rng.capture()

    def refuse(self, losses: Sequence[float]) -> str:
        """Why a step with finite gradients must not move weights; empty: it may."""
        return "" if self._options.spike == "ignore" else self._spike(losses[0])

    def reconsider(self, first: StepResult, again: Callable[[], StepResult]) -> StepResult:
        """Compute a refused step again from the same random numbers; what counts is the second result.

        A fault that does not come back cannot be the data's or the program's.

        Raises:
            BadStepsError: too many steps of this start came out right only the second time.
        """
        if first.update.applied or self._generators is None:
            return first
        rng.restore(self._generators)
        second = again()
        verdict = compare(first, second)
        self._note = _VERDICTS[verdict]
        if verdict == "transient":
            self._transients += 1
            self._incidents.add("transient", self._progress.step + 1, f"{_why(first)}; {self._note}")
            if self._transients > self._options.transient_limit:
                raise BadStepsError(
                    f"{self._transients} steps came out right only when they were computed again: suspect hardware"
                )
        return second

    def step_done(self, event: StepEvent) -> None:
        result, options = event.result, self._options
        if result.update.applied:
            self._in_a_row = 0
            if why := self._spike(result.losses[0]):
                self._incidents.add("spike", event.step, why)
            self._losses.append(result.losses[0])
            return
        self._in_a_row += 1
        spiked = bool(result.update.reason)
        policy, limit = (
            (options.spike, options.spike_limit) if spiked else (options.non_finite, options.non_finite_limit)
        )
        why = "; ".join(filter(None, (_why(result), self._note)))
        self._incidents.add("spike" if spiked else "refused", event.step, why)
        if policy == "rollback" and self._rollbacks < options.rollback_limit:
            self._go_back(event.step)
        elif policy != "skip" or self._in_a_row > limit:
            raise BadStepsError(_ending(policy, self._in_a_row, self._rollbacks, why))

    def _go_back(self, step: int) -> None:
        self._rollbacks += 1
        self._progress.step = self._rollback(step)
        self._in_a_row = 0
        text = f"from step {step} to {self._progress.step}; the data that was read since is skipped"
        self._incidents.add("rollback", self._progress.step, text)

    def _spike(self, loss: float) -> str:
        if len(self._losses) < math.ceil(self._options.spike_window_steps / 2):
            return ""
        usual = median(self._losses)
        if loss <= usual + self._options.spike_nats:
            return ""
        return f"loss {loss:.4f} is {loss - usual:.2f} nats above the median {usual:.4f} of recent steps"


def compare(first: StepResult, second: StepResult) -> Verdict:
    """What a second computation of a refused step says about the first; the bits of losses and norm are compared."""
    if second.update.applied:
        return "transient"
    same = repr((first.losses, first.update.grad_norm)) == repr((second.losses, second.update.grad_norm))
    return "reproducible" if same else "not bitwise"


_VERDICTS: dict[Verdict, str] = {
    "transient": "computed again it is sound, so the first result was a fault of hardware",
    "reproducible": "computed again it is the same to the bit, so data or program are the reason",
    "not bitwise": "computed again it is bad too, with other bits",
}


def _why(result: StepResult) -> str:
    names = result.update.non_finite
    return result.update.reason or f"non-finite gradients in {len(names)} parameters, first {next(iter(names), 'none')}"


def _ending(policy: str, in_a_row: int, rollbacks: int, why: str) -> str:
    if policy == "skip":
        return f"{in_a_row} steps in a row were refused, the last one: {why}"
    if policy == "rollback":
        return f"bad again after {rollbacks} rollbacks: {why}"
    return f"a bad step, which the recipe does not tolerate: {why}"
