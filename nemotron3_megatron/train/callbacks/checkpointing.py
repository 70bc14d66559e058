"""Save every so many steps, when the run ends, and when it is stopped."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

from nemotron3_megatron.checkpoint.retention import retention_of
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.step import Trainer

_log = logging.getLogger(__name__)


class Saves:
    """How a run saves: at once, or with ``checkpoint.async_save`` from a worker while training goes on.

    All methods but :meth:`measured` are collectives.
    """

    def __init__(self, trainer: Trainer, store: CheckpointStore, state: Callable[[int], dict[str, Any]]) -> None:
        """Prepare.

        Args:
            trainer: model and optimizer to save.
            store: where to.
            state: everything else that a resumed run needs, of a step; called on every rank.
        """
        run = trainer.run
        self._in_background = run.checkpoint.async_save and run.checkpoint.every is not None
        self._retention = retention_of(run)
        self._trainer = trainer
        self._store = store
        self._state = state
        self._measured: tuple[int, float] | None = None

    def __call__(self, step: int) -> None:
        """Save; in the background, return when training may go on."""
        if self._store.saver.under_way:
            _log.warning("step %d waits for the checkpoint before: the disk is slower than training", step)
            self._finish(step, wait=True)
        if self._in_background:
            self._store.saver.begin(step, self._trainer.chunks, self._trainer.optimizer, self._full_state(step))
        else:
            self._save_now(step)

    def start(self) -> None:
        """Get the worker ready."""
        if self._in_background:
            self._store.saver.start_worker(self._trainer.chunks, self._trainer.optimizer)

    def measured(self, step: int, validation_loss: float) -> None:
        """Note the validation loss of a step, for ``checkpoint.keep_best``."""
        self._measured = (step, validation_loss)

    def poll(self, step: int) -> None:
        """Publish what the worker has done by now; a checkpoint that died with its worker is saved anew."""
        if self._store.saver.under_way:
            self._finish(step, wait=False)

    def settle(self, step: int) -> None:
        """Wait until nothing is under way."""
        if self._store.saver.under_way:
            self._finish(step, wait=True)

    def _finish(self, step: int, *, wait: bool) -> None:
        outcome = self._store.saver.poll(wait=wait)
        if outcome == "published":
            self._store.retain(self._retention)
        elif outcome == "lost":
            _log.warning("a checkpoint is lost with the worker that wrote it; saving step %d now", step)
            self._save_now(step)

    def _save_now(self, step: int) -> None:
        self._store.save(step, self._trainer.chunks, self._trainer.optimizer, self._full_state(step), keep_last=None)
        self._store.retain(self._retention)

    def _full_state(self, step: int) -> dict[str, Any]:
        state = self._state(step)
        if self._measured is not None and self._measured[0] == step:
            state["validation_loss"] = self._measured[1]
        return state


class Checkpointing(Callback):
    """Decides when to save; how is the business of ``save``."""

    def __init__(self, run: Run, save: Callable[[int], None], saves: Saves | None = None) -> None:
        """Prepare.

        Args:
            run: says when.
            save: called with the steps done.
            saves: what ``save`` may leave under way.
        """
        self._due = partial(run.is_due, run.checkpoint.every)
        self._at_end = run.checkpoint.save_at_end
        self._save = save
        self._saves = saves
        self._saved_step = -1

    def started(self, progress: Progress) -> None:
        self._saved_step = progress.step
        if self._saves is not None:
            self._saves.start()

    def before_step(self, step: int) -> None:
        # A rollback has undone what was saved after the step that it went back to.
        self._saved_step = min(self._saved_step, step - 1)

    def step_done(self, event: StepEvent) -> None:
        if self._saves is not None:
            self._saves.poll(event.step)
        if self._due(event.step):
            self._save_once(event.step)

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        if self._at_end or stop is not None:
            self._save_once(progress.step)
        if self._saves is not None:
            self._saves.settle(progress.step)

    def _save_once(self, step: int) -> None:
        if step != self._saved_step:
            self._save(step)
            self._saved_step = step
