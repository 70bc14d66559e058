"""Records of steps and validation passes, handed to the writers of rank 0."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from nemotron3_megatron.config.run import Run, Shape
from nemotron3_megatron.plan.counts import flops_per_token
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.precision.backend import Backend
from nemotron3_megatron.telemetry.records import EvalRecord, Health, OperandRecord, StepRecord
from nemotron3_megatron.telemetry.throughput import tokens_per_second
from nemotron3_megatron.telemetry.writers import Writer
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.loss import Losses

_log = logging.getLogger(__name__)

Evaluate = Callable[[StepEvent], Losses]


class Recording(Callback):
    """Turns step events into records; writers exist on rank 0 only."""

    def __init__(
        self,
        run: Run,
        platform: Platform,
        writers: Sequence[Writer],
        *,
        backend: Backend = "none",
        operands: Callable[[], tuple[OperandRecord, ...]] = tuple,
        health: Callable[[], Health] = dict,
    ) -> None:
        """Prepare.

        Args:
            run: gives the model's arithmetic.
            platform: knows peak memory and the device's peak.
            writers: of rank 0.
            backend: of the precision plan.
            operands: what was sampled of quantised operands in the step that was just done.
            health: what was measured in it.
        """
        self._run = run
        self._platform = platform
        self._backend = backend
        self._writers = writers
        self._operands = operands
        self._health = health

    def step_done(self, event: StepEvent) -> None:
        if not self._writers:
            return
        main, *depths = event.result.losses
        update = event.result.update
        reason = "" if update.applied else update.reason or f"non-finite gradients in {_first_few(update.non_finite)}"
        shape = self._run.shape_at(event.step - 1)
        rate = tokens_per_second(shape.tokens_per_step, event.step_time_s)
        flops = self._flops(shape, rate)
        peak = self._platform.peak_flops
        record = StepRecord(
            step=event.step,
            tokens=event.tokens,
            stage=event.stage.name,
            loss=main,
            mtp_losses=tuple(depths),
            grad_norm=update.grad_norm,
            lr=event.lr,
            tokens_per_s=rate,
            step_time_s=event.step_time_s,
            skipped=not update.applied,
            skip_reason=reason,
            peak_memory_gib=self._platform.peak_memory_bytes() / 2**30,
            model_tflops=flops and flops / 1e12,
            mfu=flops and peak and flops / peak,
            precision_backend=self._backend,
            precision=self._operands(),
            health=self._health(),
            tags=dict(event.result.tags),
            time_s=time.time(),
        )
        for writer in self._writers:
            writer.write(record)

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        for writer in self._writers:
            writer.close()

    def _flops(self, shape: Shape, tokens_per_s: float) -> float | None:
        """Floating-point operations of the model in a second, per rank; None on a CPU, where nobody compares them."""
        if self._platform.name == "cpu":
            return None
        return tokens_per_s * flops_per_token(self._run.model, shape.seq_length) / self._run.layout.world_size


class Validation(Callback):
    """Held-out loss every so many steps and after the last one."""

    def __init__(
        self, run: Run, evaluate: Evaluate, writers: Sequence[Writer], *, health: Callable[[], Health] = dict
    ) -> None:
        self._every = run.telemetry.eval_every if run.data.validation else None
        self._is_due = run.is_due
        if run.telemetry.eval_every and not run.data.validation:
            _log.warning("no held-out loss: telemetry.eval_every is set, but data.validation is empty")
        self._evaluate = evaluate
        self._health = health
        self._writers = writers

    def step_done(self, event: StepEvent) -> None:
        if self._every is None or not (event.last or self._is_due(self._every, event.step)):
            return
        losses = self._evaluate(event)
        main, *depths = losses.depths
        record = EvalRecord(
            step=event.step,
            tokens=event.tokens,
            stage=event.stage.name,
            validation_loss=main,
            mtp_losses=tuple(depths),
            health=self._health(),
            tags=dict(losses.tags),
        )
        for writer in self._writers:
            writer.write_eval(record)


def _first_few(names: tuple[str, ...], limit: int = 5) -> str:
    shown = ", ".join(names[:limit]) or "an unknown parameter"
    return shown + (f" and {len(names) - limit} more" if len(names) > limit else "")
