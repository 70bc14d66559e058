"""Sampled statistics of quantised operands: see ``precision.statistics`` for what they mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

from nemotron3_megatron.precision.observe import Observer, Reading
from nemotron3_megatron.precision.statistics import Summary
from nemotron3_megatron.telemetry.records import OperandRecord
from nemotron3_megatron.train.callbacks.base import Callback, StepEvent


class PrecisionTelemetry(Callback):
    """Observes the first step of a run and those that are due; stands before ``Recording``, which takes the records."""

    def __init__(self, due: Callable[[int], bool], observer: Observer) -> None:
        """Prepare.

        Args:
            due: whether a step is sampled.
            observer: of this rank's modules.
        """
        self._is_due = due
        self._observer = observer
        self._records: tuple[OperandRecord, ...] = ()

    def before_step(self, step: int) -> None:
        if self._due(step):
            self._observer.arm(step)

    def step_done(self, event: StepEvent) -> None:
        due = self._due(event.step)
        self._records = tuple(_record(*found) for found in self._observer.collect()) if due else ()

    def records(self) -> tuple[OperandRecord, ...]:
        """Of the step that was just done; empty if it was not sampled."""
        return self._records

    def _due(self, step: int) -> bool:
        return step == 1 or self._is_due(step)


def _record(reading: Reading, found: Summary) -> OperandRecord:
    """Numbers with 5 significant digits: they are estimates, and there are many."""
    row = reading.row
    return OperandRecord(
        module=row.module,
        layer=row.layer,
        role=row.role,
        tensor=reading.operand.tensor,
        direction=reading.along,
        format=row.format,
        **{name: float(f"{value:.5g}") for name, value in asdict(found).items()},
    )
