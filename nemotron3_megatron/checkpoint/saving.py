"""Saving: by the training process itself, or by a worker while training goes on."""

from __future__ import annotations

import json
import logging
import secrets
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from nemotron3_megatron.checkpoint import adam, content, manifest, writing
from nemotron3_megatron.checkpoint.collective import is_rank_zero, lowest, on_rank_zero, to_rank_zero
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.checkpoint.planning import Planner, Shards
from nemotron3_megatron.checkpoint.worker import Worker, WorkerDied
from nemotron3_megatron.checkpoint.writing import Written
from nemotron3_megatron.config.errors import UserError

_log = logging.getLogger(__name__)

Outcome = Literal["running", "published", "lost"]

_MAX_SAMPLES = 1024
"""Kept in a manifest; all of them were compared before."""


@dataclass(frozen=True, slots=True)
class _Started:
    """A save whose directory exists and whose writing is under way."""

    partial: Path
    shards: Shards
    step: int
    optimizer_step: int | None
    layout: dict[str, int]
    state: dict[str, Any]


class Saver:
    """Saves into one directory. Everything but :attr:`under_way` is a collective."""

    def __init__(self, directory: CheckpointDirectory, require: Callable[[], None]) -> None:
        """Prepare.

        Args:
            directory: to publish in.
            require: called on rank 0 right before a checkpoint becomes visible; raises if it must not.
        """
        self._directory = directory
        self._require = require
        self._planner = Planner()
        self._worker: Worker | None = None
        self._started: _Started | None = None

    @property
    def under_way(self) -> bool:
        """Whether the worker has a save to finish."""
        return self._started is not None

    def save(
        self, step: int, chunks: list[MegatronModule], optimizer: MegatronOptimizer | None, state: dict[str, Any]
    ) -> Path:
        """Save in this process. See :meth:`.store.CheckpointStore.save`."""
        started = self._start(step, chunks, optimizer, state)
        shards = started.shards
        samples = writing.take_samples(shards.plan, shards.data, step)
        try:
            written: Written | Exception = writing.write(started.partial, shards.plan, shards.data, samples)
        except (OSError, ValueError) as error:
            written = error
        return self._finish(started, written)

    def start_worker(self, chunks: list[MegatronModule], optimizer: MegatronOptimizer | None) -> None:
        """Get ready for :meth:`begin`: plan, start the worker, reserve its memory."""
        shards = self._shards(chunks, optimizer)
        self._worker = Worker()
        self._worker.expect(shards)

    def begin(
        self, step: int, chunks: list[MegatronModule], optimizer: MegatronOptimizer | None, state: dict[str, Any]
    ) -> None:
        """As :meth:`save`, but written by the worker while training goes on; :meth:`poll` publishes it.

        The tensors may change as soon as this returns.

        Raises:
            UserError: as :meth:`save`, for what is known by now.
            RuntimeError: another save is still under way.
        """
        if self._started is not None:
            raise RuntimeError(f"the checkpoint of step {self._started.step} is not done")
        if self._worker is None:
            self._worker = Worker()
        self._started = self._start(step, chunks, optimizer, state)
        try:
            self._worker.submit(self._started.partial, self._started.shards, step)
        except WorkerDied as death:
            # Known to the others in poll, as if it had died a moment later.
            _log.warning("the checkpoint worker of rank %d died %s", dist.get_rank(), death)

    def poll(self, *, wait: bool) -> Outcome:
        """Publish the save under way if every rank's worker is done with it, or with ``wait`` once they are.

        Returns:
            ``lost`` when a worker died: there is a new one, but the checkpoint must be saved anew.

        Raises:
            UserError: some rank could not write; the earlier checkpoints are untouched.
        """
        assert self._started is not None
        assert self._worker is not None
        if not wait and not lowest(int(self._worker.ready())):
            return "running"
        started, self._started = self._started, None
        written = self._result(self._worker)
        if not lowest(int(written is not None)):
            self._replace_worker(started)
            return "lost"
        assert written is not None
        self._finish(started, written)
        return "published"

    def close(self) -> None:
        """End the worker, after what it is writing."""
        if self._worker is not None:
            self._worker.close()
            self._worker = None

    def _start(
        self, step: int, chunks: list[MegatronModule], optimizer: MegatronOptimizer | None, state: dict[str, Any]
    ) -> _Started:
        json.dumps(state)
        try:
            partial: Path = on_rank_zero(lambda: self._directory.make_room(step, secrets.token_hex(4)))
        except OSError as error:
            raise self._save_error(step, str(error.strerror or error)) from error
        return _Started(
            partial=partial,
            shards=self._shards(chunks, optimizer),
            step=step,
            optimizer_step=None if optimizer is None else adam.current_step(optimizer),
            layout=content.layout(chunks),
            state=state,
        )

    def _shards(self, chunks: list[MegatronModule], optimizer: MegatronOptimizer | None) -> Shards:
        replicas = content.unwrapped(chunks[0]).pg_collection.dp_cp
        return self._planner.shards(content.to_save(chunks, optimizer), replicas)

    def _finish(self, started: _Started, written: Written | Exception) -> Path:
        """Publish what all ranks have written, or say which of them could not."""
        outcomes = to_rank_zero(written)
        return on_rank_zero(lambda: self._publish(started, outcomes or []))

    def _publish(self, started: _Started, outcomes: list[Written | Exception]) -> Path:
        try:
            self._require()
            for rank, outcome in enumerate(outcomes):
                if isinstance(outcome, Exception):
                    words = outcome.strerror if isinstance(outcome, OSError) else outcome
                    raise self._save_error(started.step, f"{words} on rank {rank}")
            return self._directory.publish(
                started.partial, _complete(started, [o for o in outcomes if isinstance(o, Written)])
            )
        except OSError as error:
            raise self._save_error(started.step, str(error.strerror or error)) from error
        except UserError:
            shutil.rmtree(started.partial, ignore_errors=True)
            raise

    def _result(self, worker: Worker) -> Written | Exception | None:
        """None: the worker died."""
        try:
            return worker.result()
        except WorkerDied as death:
            _log.warning("the checkpoint worker of rank %d died %s", dist.get_rank(), death)
            return None
        except (OSError, ValueError) as error:
            return error

    def _replace_worker(self, started: _Started) -> None:
        assert self._worker is not None
        self._worker.close()
        self._worker = Worker()
        on_rank_zero(lambda: shutil.rmtree(started.partial, ignore_errors=True))

    def _save_error(self, step: int, why: str) -> UserError:
        previous = next((path.name for path in self._directory.complete()), None) if is_rank_zero() else None
        intact = f"; {previous} is intact" if previous else ""
        return UserError(
            f"the checkpoint of step {step} could not be saved", where=str(self._directory.root), why=why + intact
        )


def _complete(started: _Started, written: list[Written]) -> Manifest:
    """Write the index beside all ranks' files; returns the manifest of everything."""
    assert started.shards.metadata is not None
    FileSystemWriter(started.partial, sync_files=True).finish(
        started.shards.metadata, [part.results for part in written]
    )
    save_config(CheckpointingConfig("torch_dist", 1), str(started.partial))
    files = {name: found for part in written for name, found in part.files.items()}
    for path in started.partial.iterdir():
        if path.name not in files:
            manifest.sync(path)
            files[path.name] = manifest.record(path)
    samples = [sample for part in written for sample in part.samples]
    return Manifest(
        step=started.step,
        optimizer_step=started.optimizer_step,
        layout=started.layout,
        files=files,
        state=started.state,
        samples=tuple(samples[:: -(-len(samples) // _MAX_SAMPLES) or 1]),
    )
