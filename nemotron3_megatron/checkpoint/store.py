"""Checkpoints of a run on disk: published atomically, verified before use, never the last good one lost."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule
from torch.distributed.checkpoint.api import CheckpointException

from nemotron3_megatron.checkpoint import adam, compare, content, manifest
from nemotron3_megatron.checkpoint.collective import is_rank_zero, on_every_rank, on_rank_zero
from nemotron3_megatron.checkpoint.manifest import FileRecord, Manifest
from nemotron3_megatron.config.errors import UserError

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")
_SCRATCH = re.compile(r"\.step_\d{8,}\.(partial|deleted)")
_RETIRED = re.compile(r"\.(step_\d{8,})\.retired")


def load_state(path: Path) -> dict[str, Any]:
    """The training state that ``save`` was given, without reading a tensor or needing a process group.

    Raises:
        UserError: ``path`` is not a complete checkpoint.
    """
    return _verified(path).state


class CheckpointStore:
    """The checkpoints of one run: ``<run_dir>/checkpoints/step_XXXXXXXX/``.

    ``save``, ``newest`` and ``load`` are collectives over all ranks, which must share the directory.
    """

    def __init__(self, run_dir: Path) -> None:
        self._root = Path(run_dir) / "checkpoints"

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

        It is written under a hidden name and renamed once every byte is on disk, so that a directory called
        ``step_XXXXXXXX`` is always complete, whenever the process is killed. One of the same step (left behind
        by a roll-back, or damaged) is replaced.

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
        json.dumps(state)
        final = self._root / f"step_{step:08d}"
        partial = self._root / f".{final.name}.partial"
        try:
            on_rank_zero(lambda: self._make_room(partial))
            content.save(partial, chunks, optimizer)
            document = Manifest(
                step=step,
                optimizer_step=None if optimizer is None else adam.current_step(optimizer),
                layout=content.layout(chunks),
                files=_written_files(partial),
                state=state,
            )
            on_rank_zero(lambda: _publish(partial, final, document))
        except (OSError, CheckpointException) as error:
            raise self._save_error(step, partial, error) from error
        if keep_last is not None:
            on_rank_zero(lambda: self._delete_oldest(keep_last))
        return final

    def newest(self) -> Path | None:
        """The newest complete checkpoint, or None. Damaged ones are passed over with a warning that says why."""
        return on_rank_zero(lambda: next(self._complete(), None))

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
        on_every_rank(lambda: _verify_share(path, found))
        layout = content.layout(chunks)
        if optimizer is not None:
            if found.optimizer_step is None:
                raise UserError(f"checkpoint {path}", why="it holds weights only, no optimizer state to resume from")
            adam.prepare(optimizer)
        template = content.sharded(chunks, optimizer, is_loading=True)
        _require_match(path, template, weights_only=optimizer is None)
        try:
            content.load(path, template, chunks, optimizer, with_rng=found.layout == layout)
        except (OSError, CheckpointException) as error:
            raise UserError(f"checkpoint {path}", why=f"it cannot be read: {_cause(error)}") from error
        if optimizer is not None and found.optimizer_step is not None:
            adam.set_step(optimizer, found.optimizer_step)
        if found.layout != layout:
            _log.info("resumed under another layout: %s -> %s", found.layout, layout)
        return found.state

    def _complete(self) -> Iterator[Path]:
        """Complete checkpoints, newest first."""
        self._recover_retired()
        directories = self._root.glob("step_*") if self._root.is_dir() else ()
        for path in sorted((path for path in directories if _NAME.fullmatch(path.name)), key=_step_of, reverse=True):
            try:
                manifest.verify(path)
            except ValueError as damage:
                _log.warning("checkpoint %s is damaged: %s; falling back to the one before it", path, damage)
            else:
                yield path

    def _make_room(self, partial: Path) -> None:
        """An empty ``partial``, without what earlier, killed processes left behind."""
        self._recover_retired()
        self._root.mkdir(parents=True, exist_ok=True)
        for path in self._root.iterdir():
            if _SCRATCH.fullmatch(path.name):
                shutil.rmtree(path)
        partial.mkdir()

    def _recover_retired(self) -> None:
        """Undo the replacement of a checkpoint that was killed between its two renames."""
        for path in self._root.glob(".step_*.retired"):
            match = _RETIRED.fullmatch(path.name)
            if match is None:
                continue
            final = self._root / match[1]
            if final.exists():
                shutil.rmtree(path)
            else:
                path.rename(final)

    def _delete_oldest(self, keep_last: int) -> None:
        for path in list(self._complete())[max(keep_last, 1) :]:
            doomed = self._root / f".{path.name}.deleted"
            path.rename(doomed)  # at once, so that no half-deleted directory ever looks like a checkpoint
            shutil.rmtree(doomed)

    def _save_error(self, step: int, partial: Path, error: BaseException) -> UserError:
        if is_rank_zero():
            shutil.rmtree(partial, ignore_errors=True)
        previous = next((path.name for path in self._complete()), None) if is_rank_zero() else None
        intact = f"; {previous} is intact" if previous else ""
        return UserError(
            f"the checkpoint of step {step} could not be saved", where=str(self._root), why=_cause(error) + intact
        )


def _written_files(directory: Path) -> dict[str, FileRecord]:
    """Records of all files of a checkpoint, each taken by the rank that wrote it. A collective."""

    def mine() -> dict[str, FileRecord]:
        shards = list(directory.glob(f"__{dist.get_rank()}_*"))
        indices = [path for path in directory.iterdir() if not path.name.startswith("__")] if is_rank_zero() else []
        return {path.name: manifest.record(path) for path in (*shards, *indices)}

    return {name: record for files in on_every_rank(mine) for name, record in files.items()}


def _publish(partial: Path, final: Path, document: Manifest) -> None:
    """Complete ``partial`` with its manifest and give it its final name."""
    manifest.write(document, partial)
    retired = final.parent / f".{final.name}.retired"
    if final.exists():
        final.rename(retired)
    partial.rename(final)
    manifest.sync_directory(final.parent)
    shutil.rmtree(retired, ignore_errors=True)


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
    try:
        manifest.verify_contents(found, path, share=dist.get_rank(), shares=dist.get_world_size())
    except (ValueError, OSError) as damage:
        raise UserError(
            f"checkpoint {path}",
            why=f"{damage}; remove it, and the run continues from the one before it",
        ) from None


def _step_of(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def _cause(error: BaseException) -> str:
    """The first system error behind ``error`` in words, with the rank it happened on."""
    failures = error.failures if isinstance(error, CheckpointException) else {None: (error, None)}
    for rank, (failure, _) in sorted(failures.items(), key=lambda item: item[0] or 0):
        place = "" if rank is None else f" on rank {rank}"
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, OSError) and cause.errno is not None:
                return f"{os.strerror(cause.errno)}{place}"
            cause = cause.__cause__ or cause.__context__
    return f"{failure}{place}"
