"""The callbacks with which a run minds itself (``resilience.*``, ``debug.fault``, ``telemetry.health_every``)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial

import torch

from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.fault import parse_faults
from nemotron3_megatron.resilience.watch import Watch
from nemotron3_megatron.telemetry.incidents import IncidentLog
from nemotron3_megatron.telemetry.records import Health
from nemotron3_megatron.train.callbacks.base import Callback, StepEvent
from nemotron3_megatron.train.callbacks.faults import Faults
from nemotron3_megatron.train.callbacks.health import HealthTelemetry
from nemotron3_megatron.train.callbacks.kernel_times import kernel_times
from nemotron3_megatron.train.callbacks.recording import Evaluate
from nemotron3_megatron.train.callbacks.spikes import StepJudge
from nemotron3_megatron.train.callbacks.stragglers import Stragglers
from nemotron3_megatron.train.callbacks.watchdog import Watchdog
from nemotron3_megatron.train.loss import Losses
from nemotron3_megatron.train.step import Trainer


@dataclass(frozen=True, slots=True)
class Minding:
    """What a run's wiring needs of it; all ranks have the same callbacks."""

    trainer: Trainer
    """The given one, with a judge."""
    first: list[Callback]
    """Before all callbacks that record or save."""
    last: list[Callback]
    """After them."""
    watch: Watch
    measured: HealthTelemetry | None

    def health(self) -> Health:
        """What was measured of the step or the validation that was just done."""
        return {} if self.measured is None else self.measured.health()

    def saving(self, save: Callable[[int], None]) -> Callable[[int], None]:
        """``save`` under its own time limit."""

        def watched(step: int) -> None:
            with self.watch.during("save"):
                save(step)

        return watched

    def evaluating(self, evaluate: Evaluate) -> Evaluate:
        """``evaluate`` under its own time limit, with the load of experts measured."""

        def watched(event: StepEvent) -> Losses:
            with ExitStack() as stack:
                stack.enter_context(self.watch.during("evaluation"))
                if self.measured is not None:
                    stack.enter_context(self.measured.validating())
                return evaluate(event)

        return watched


def mind(trainer: Trainer, watch: Watch, store: CheckpointStore) -> Minding:
    """Callbacks and judge of a run.

    Args:
        trainer: of the run.
        watch: of this process.
        store: where a rollback finds checkpoints.
    """
    run, rank = trainer.run, torch.distributed.get_rank()
    incidents = IncidentLog(run.run_dir, writes=rank == 0)

    def rollback(step: int) -> int:
        with watch.during("start"):
            path = store.back(run.resilience.rollback_checkpoints, step)
            if path is None:
                raise UserError(
                    f"resilience.rollback_checkpoints={run.resilience.rollback_checkpoints}",
                    why=f"step {step} was bad, and there are not so many checkpoints before it to roll back to",
                    nearest="checkpoint.every with fewer steps, or resilience.spike=skip",
                )
            done: int = store.load(path, trainer.chunks, trainer.optimizer)["step"]
        return done

    judge = StepJudge(run.resilience, rollback, incidents)
    faults = parse_faults(run.debug.fault)
    health_every = run.telemetry.health_every
    measured = HealthTelemetry(partial(run.is_due, health_every), trainer) if health_every else None
    first: list[Callback] = [Watchdog(run, watch)]
    if faults:
        first.append(Faults(faults, run, rank, [chunk.decoder for chunk in trainer.chunks]))
    if measured is not None:
        first.append(measured)
    last: list[Callback] = [judge]
    if straggler_every := run.resilience.straggler_every:
        factor, measured_by = run.resilience.straggler_factor, kernel_times(run.resilience.straggler, trainer.platform)
        places = (incidents, run.run_dir, measured_by)
        last.insert(0, Stragglers(partial(run.is_due, straggler_every), factor, trainer.platform, *places))
    return Minding(replace(trainer, judge=judge), first, last, watch, measured)
