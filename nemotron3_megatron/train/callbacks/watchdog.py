"""Tells the rank's watch which step it is in."""

from __future__ import annotations

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.resilience.watch import Watch
from nemotron3_megatron.train.callbacks.base import Callback, Progress, Stop


class Watchdog(Callback):
    """Stands first, so that its ``finished`` comes last."""

    def __init__(self, run: Run, watch: Watch) -> None:
        self._run = run
        self._watch = watch
        self._step = 0
        self._first = True

    def before_step(self, step: int) -> None:
        self._step = step
        self._watch.enter("first step" if self._first else "step", step, self._stage())
        self._first = False

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        self._watch.enter("end", self._step, self._stage())

    def _stage(self) -> str:
        return self._run.stage_at(max(self._step - 1, 0)).name
