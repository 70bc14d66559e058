"""Health diagnostics of sampled steps and of validation; see ``train.diagnostics`` for what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from nemotron3_megatron.telemetry.records import Health
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent
from nemotron3_megatron.train.diagnostics import Diagnostics, require_float32_gradients
from nemotron3_megatron.train.step import Trainer


class HealthTelemetry(Callback):
    """Measures the first step of a run and those that are due; stands before ``Recording``, which takes the record."""

    def __init__(self, due: Callable[[int], bool], trainer: Trainer) -> None:
        self._is_due = due
        self._trainer = trainer
        self._diagnostics = Diagnostics(trainer)
        self._found: Health = {}

    def started(self, progress: Progress) -> None:
        for chunk in self._trainer.chunks:
            require_float32_gradients(chunk)

    def before_step(self, step: int) -> None:
        if self._due(step):
            self._diagnostics.arm()
            if self._trainer.captured is not None:
                self._trainer.captured.unsee = self._diagnostics.forget

    def step_done(self, event: StepEvent) -> None:
        if self._trainer.captured is not None:
            self._trainer.captured.unsee = None
        self._found = self._diagnostics.collect(event.result) if self._due(event.step) else {}

    def health(self) -> Health:
        """Of the step, or of the validation, that was just done; empty if it was not measured."""
        return self._found

    @contextmanager
    def validating(self) -> Iterator[None]:
        """Measure expert load of the validation passes inside."""
        self._diagnostics.arm()
        yield
        self._found = self._diagnostics.loads()

    def _due(self, step: int) -> bool:
        return step == 1 or self._is_due(step)
