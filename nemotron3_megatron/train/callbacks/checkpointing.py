"""Save every so many steps, when the run ends, and when it is stopped."""

from __future__ import annotations

from collections.abc import Callable

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop


class Checkpointing(Callback):
    """Decides when to save; how is the ``save`` function's business."""

    def __init__(self, run: Run, save: Callable[[int], None]) -> None:
        self._every = run.checkpoint_every_steps
        self._at_end = run.checkpoint.save_at_end
        self._save = save
        self._saved_step = -1

    def started(self, progress: Progress) -> None:
        self._saved_step = progress.step

    def step_done(self, event: StepEvent) -> None:
        if self._every and event.step % self._every == 0:
            self._save_once(event.step)

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        if self._at_end or stop is not None:
            self._save_once(progress.step)

    def _save_once(self, step: int) -> None:
        if step != self._saved_step:
            self._save(step)
            self._saved_step = step
