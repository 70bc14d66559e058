"""The training loop: batches in, steps out, callbacks in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from nemotron3_megatron.config.run import Run, Shape
from nemotron3_megatron.data.training import TrainingData
from nemotron3_megatron.telemetry.throughput import StepTimer
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.garbage import collected_between_steps
from nemotron3_megatron.train.schedule import learning_rate
from nemotron3_megatron.train.step import Trainer, train_step


def run_steps(trainer: Trainer, data: TrainingData, progress: Progress, callbacks: Sequence[Callback]) -> Stop | None:
    """Train from ``progress`` to the run's last step, or until a callback asks to stop.

    Returns:
        Why the loop ended early, or None when the target was reached.
    """
    for callback in callbacks:
        callback.started(progress)
    with collected_between_steps() as after_step:
        stop = _run_steps(trainer, data, progress, callbacks, after_step)
    for callback in reversed(callbacks):
        callback.finished(progress, stop)
    return stop if progress.step < trainer.run.total_steps else None


def _run_steps(
    trainer: Trainer,
    data: TrainingData,
    progress: Progress,
    callbacks: Sequence[Callback],
    after_step: Callable[[int], None],
) -> Stop | None:
    run, timer = trainer.run, StepTimer()
    stop: Stop | None = None
    while progress.step < run.total_steps and stop is None:
        stage, shapes = run.stage_at(progress.step), _shapes_from(run, progress.step)
        lr = learning_rate(run.schedule, run.tokens_at(progress.step))
        for callback in callbacks:
            callback.before_step(progress.step + 1)
        # A step has read its gradients' norm when it returns; a GPU may still be updating weights, and goes on to the
        # next step without a pause. Times add up nonetheless: each ends at the same place.
        timer.start()
        result = train_step(trainer, data.next_step(*shapes), shapes[0], lr)
        seconds = timer.stop()
        progress.step += 1
        stop = _first_stop(callbacks, progress.step)
        event = StepEvent(
            step=progress.step,
            tokens=run.tokens_at(progress.step),
            stage=stage,
            lr=lr,
            result=result,
            step_time_s=seconds,
            last=progress.step == run.total_steps,
        )
        for callback in callbacks:
            callback.step_done(event)
        after_step(progress.step)
    return stop


def _shapes_from(run: Run, step: int) -> list[Shape]:
    """The batch of a step and those of the steps after it that may be prepared ahead: under this start's layout."""
    steps = range(step, min(step + 1 + run.data.num_prefetch, run.total_steps))
    return [run.shape_at(ahead) for ahead in steps if run.can_train(run.stage_at(ahead))]


def _first_stop(callbacks: Sequence[Callback], step: int) -> Stop | None:
    """Every callback is asked on every rank: the question may be a collective."""
    answers = [callback.wants_stop(step) for callback in callbacks]
    return next((answer for answer in answers if answer is not None), None)
