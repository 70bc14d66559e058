"""Checkpoints of a run: published atomically, verified before use, never the last good one lost."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from nemotron3_megatron.checkpoint import adam, compare, content, manifest, writing
from nemotron3_megatron.checkpoint.claim import Claim
from nemotron3_megatron.checkpoint.collective import is_rank_zero, on_every_rank, on_rank_zero
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory, warn_of_damage
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.checkpoint.retention import Retention
from nemotron3_megatron.checkpoint.saving import Saver
from nemotron3_megatron.config.errors import UserError

_log = logging.getLogger(__name__)


def load_state(path: Path) -> dict[str, Any]:
    """The training state that ``save`` was given, without reading a tensor or needing a process group.

    Raises:
        UserError: ``path`` is not a complete checkpoint.
    """
    return _verified(path).state


class CheckpointStore:
    """The checkpoints of one run: ``<run_dir>/checkpoints/step_XXXXXXXX/``.

    ``claim``, ``release`` and everything that saves or loads are collectives over all ranks, which must share the
    directory. A checkpoint is written under a hidden name and renamed once every byte is on disk, so that a
    directory called ``step_XXXXXXXX`` is always complete, whenever any process is killed.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = Path(run_dir)
        self._directory = CheckpointDirectory(run_dir)
        self._saver = Saver(self._directory, self._require_claim)
        self._claim: Claim | None = None
        self._intact: Path | None = None

    def claim(self) -> None:
        """Keep other jobs out of the run directory until :meth:`release`, or until this process ends.

        Raises:
            UserError: another job is in it.
        """
        on_rank_zero(self._take_claim)

    def release(self) -> None:
        """End the claim, and the worker if there is one."""
        self._saver.close()
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def save(
        self,
        step: int,
        chunks: list[MegatronModule],
        optimizer: MegatronOptimizer | None,
        state: dict[str, Any],
        *,
        keep_last: int | None,
    ) -> Path:
        """Save and publish a checkpoint, then delete those older than the newest ``keep_last``.

        One of the same step (left behind by a roll-back, or damaged) is replaced.

        Args:
            step: optimizer steps done.
            chunks: the model's pipeline chunks on this rank, as trained (DDP and Float16Module or bare).
            optimizer: its state goes in unless None.
            state: JSON values that do not depend on the layout; rank 0's are saved.
            keep_last: complete checkpoints to keep; None keeps all.

        Returns:
            The directory of the new checkpoint.

        Raises:
            UserError: it could not be written (full disk, permissions); the earlier ones are untouched.
            TypeError: ``state`` is not JSON.
        """
        final = self._saver.save(step, chunks, optimizer, state)
        self.retain(Retention(keep_last))
        return final

    @property
    def saver(self) -> Saver:
        """For saving while training goes on."""
        return self._saver

    def retain(self, rule: Retention) -> None:
        """Delete the checkpoints that ``rule`` does not keep."""
        on_rank_zero(lambda: self._directory.retain(rule))

    def newest(self) -> Path | None:
        """The newest good checkpoint, every byte of it read; None if there is nothing that looks like one.

        Damaged ones are passed over with a warning that says why; one whose bytes have changed is renamed.

        Raises:
            UserError: there are checkpoints, but none is good (a fresh start would overwrite the run's records).
        """
        candidates = on_rank_zero(self._candidates)
        for path in candidates:
            try:
                self._verify_contents(path)
            except UserError as damage:
                if is_rank_zero():
                    warn_of_damage(path, damage)
                    if isinstance(damage, _Damaged):
                        self._directory.set_aside(path)
            else:
                self._intact = path
                return path
        if not on_rank_zero(self._directory.is_new):
            raise UserError(
                f"run_dir={self._run_dir}",
                why="none of its checkpoints is intact",
                nearest="checkpoint.load=DIR of another run, and another run_dir",
            )
        return None

    def back(self, checkpoints: int, step: int) -> Path | None:
        """The ``checkpoints``-th newest complete checkpoint before ``step``, or None. Newer ones are set aside as
        ``abandoned_step_XXXXXXXX``: a later start must not continue from what was rolled back."""
        if self._saver.under_way:
            self._saver.poll(wait=True)
        return on_rank_zero(lambda: self._directory.back(checkpoints, step))

    def load(self, path: Path, chunks: list[MegatronModule], optimizer: MegatronOptimizer | None) -> dict[str, Any]:
        """Load a checkpoint, saved under any layout and by either kind of optimizer, into a built model.

        Nothing is changed unless every tensor is there in the right shape. Under the layout that saved it,
        random states come back too. With ``optimizer=None`` only weights are read; call
        ``optimizer.reload_model_params()`` afterwards if there is an optimizer all the same.

        Returns:
            The ``state`` given to :meth:`save`.

        Raises:
            UserError: the checkpoint is incomplete, damaged, or of another model (with a table of what differs).
        """
        path = Path(path)
        found = on_rank_zero(lambda: _verified(path))
        if path != self._intact:
            self._verify_contents(path)
        layout = content.layout(chunks)
        if optimizer is not None:
            if found.optimizer_step is None:
                raise UserError(f"checkpoint {path}", why="it holds weights only, no optimizer state to resume from")
            adam.prepare(optimizer)
        template = content.sharded(chunks, optimizer)
        _require_match(path, template, weights_only=optimizer is None)
        try:
            other_dtypes = compare.has_other_dtypes(path, template)
            content.load(path, template, chunks, with_rng=found.layout == layout)
        except (OSError, CheckpointException) as error:
            raise UserError(f"checkpoint {path}", why=f"it cannot be read: {writing.system_error(error)}") from error
        if optimizer is not None and found.optimizer_step is not None:
            adam.set_step(optimizer, found.optimizer_step)
            if other_dtypes:
                adam.weights_from_masters(optimizer)
        if optimizer is not None and found.layout != layout:
            _log.info("resumed under another layout: %s -> %s", found.layout, layout)
        return found.state

    def _candidates(self) -> list[Path]:
        self._directory.recover()
        return list(self._directory.complete())

    def _take_claim(self) -> None:
        self._claim = Claim.take(self._run_dir)

    def _require_claim(self) -> None:
        if self._claim is not None:
            self._claim.require()

    def _verify_contents(self, path: Path) -> None:
        found = on_rank_zero(lambda: _verified(path))
        on_every_rank(lambda: _verify_share(path, found))


class _Damaged(UserError):
    """Bytes have changed since they were written; not: a disk that did not answer."""


def _require_match(path: Path, template: dict[str, Any], *, weights_only: bool) -> None:
    stored = compare.stored_shapes(path)
    if weights_only:
        stored = {key: shape for key, shape in stored.items() if not key.startswith(adam.PREFIX)}
    rows = compare.differences(stored, compare.wanted_shapes(template))
    if rows:
        raise UserError(
            f"checkpoint {path}",
            why=f"it is of another model; {len(rows)} tensors differ\n{compare.table(rows)}",
            nearest="the recipe that saved it (run.json in its run directory)",
        )


def _verified(path: Path) -> Manifest:
    try:
        return manifest.verify(Path(path))
    except ValueError as damage:
        raise UserError(f"checkpoint {path}", why=f"it is not complete: {damage}") from None


def _verify_share(path: Path, found: Manifest) -> None:
    """Read this rank's share of the files."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    try:
        manifest.verify_contents(found, path, share=rank, shares=size)
    except ValueError as damage:
        raise _Damaged(f"checkpoint {path}", why=str(damage)) from None
    except OSError as error:
        raise UserError(f"checkpoint {path}", why=f"it cannot be read: {error.strerror or error}") from None
