"""The folder that holds a run's checkpoints: what is complete, what is left over, how one appears and disappears.

Nothing here depends on clocks: checkpoints are ordered by their step, and leftovers are known by their names.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.checkpoint.retention import Retention, Saved, kept

_log = logging.getLogger(__name__)

_NAME = re.compile(r"step_(\d{8,})")
_DAMAGED, _ABANDONED = "damaged_", "abandoned_"
"""Before the name of a checkpoint that no start shall continue from."""
_SCRATCH = re.compile(rf"\.({_DAMAGED}|{_ABANDONED})?step_\d{{8,}}\.(\w+\.)?(partial|deleted)")
_RETIRED = re.compile(r"\.(step_\d{8,})\.retired")


class CheckpointDirectory:
    """``<run_dir>/checkpoints``; used by one process at a time."""

    def __init__(self, run_dir: Path) -> None:
        self.root = Path(run_dir) / "checkpoints"

    def path(self, step: int) -> Path:
        """Where the checkpoint of ``step`` is, once it is complete."""
        return self.root / f"step_{step:08d}"

    def present(self) -> list[Path]:
        """Everything that has a checkpoint's name, newest first."""
        directories = self.root.glob("step_*") if self.root.is_dir() else ()
        return sorted((path for path in directories if _NAME.fullmatch(path.name)), key=step_of, reverse=True)

    def damaged(self) -> list[Path]:
        """What :meth:`set_aside` has renamed."""
        return sorted(self.root.glob(f"{_DAMAGED}step_*"))

    def abandoned(self) -> list[Path]:
        """What :meth:`back` has renamed."""
        return sorted(self.root.glob(f"{_ABANDONED}step_*"))

    def complete(self) -> Iterator[Path]:
        """Those with all files in their full size, newest first; the others are warned about."""
        for path in self.present():
            try:
                manifest.verify(path)
            except ValueError as damage:
                warn_of_damage(path, damage)
            else:
                yield path

    def make_room(self, step: int, token: str) -> Path:
        """A new, empty, hidden directory to write into; what killed processes left behind is removed.

        Its name holds ``token``: a writer that outlived its run never touches the files of the next.
        """
        self.recover()
        self.root.mkdir(parents=True, exist_ok=True)
        for path in self.leftovers():
            with suppress(OSError):  # an orphan may still be writing there: what is left is removed next time
                erase(path)
        partial = self.root / f".{self.path(step).name}.{token}.partial"
        partial.mkdir()
        return partial

    def leftovers(self) -> list[Path]:
        """What killed processes left behind."""
        return [path for path in self.root.iterdir() if _SCRATCH.fullmatch(path.name)]

    def publish(self, partial: Path, document: Manifest) -> Path:
        """Complete ``partial`` with its manifest and give it its final name. One of the same step is replaced."""
        manifest.write(document, partial)
        final = self.path(document.step)
        retired = self.root / f".{final.name}.retired"
        if final.exists():
            final.rename(retired)
        partial.rename(final)
        manifest.sync(self.root)
        shutil.rmtree(retired, ignore_errors=True)
        return final

    def retain(self, rule: Retention) -> None:
        """Delete the complete checkpoints that ``rule`` does not keep; one that resists is warned about."""
        if rule.keep_last is None:
            return
        found = {path: manifest.read(path) for path in self.complete()}
        steps = kept([_saved(document) for document in found.values()], rule)
        for path, document in found.items():
            if document.step not in steps:
                try:
                    self.remove(path)
                except OSError as error:  # no reason to end a run that has just saved what it needs
                    _log.warning("checkpoint %s could not be removed: %s", path, error.strerror or error)

    def back(self, checkpoints: int, step: int) -> Path | None:
        """See :meth:`.store.CheckpointStore.back`."""
        complete = list(self.complete())
        before = [path for path in complete if step_of(path) < step]
        chosen = before[checkpoints - 1] if len(before) >= checkpoints else None
        for path in complete[: complete.index(chosen)] if chosen is not None else ():
            aside = self.root / f"{_ABANDONED}{path.name}"
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
        return chosen

    def set_aside(self, path: Path) -> None:
        """Rename a checkpoint whose contents are damaged to ``damaged_step_XXXXXXXX``: no start tries it again."""
        aside = self.root / f"{_DAMAGED}{path.name}"
        with suppress(OSError):  # a directory that cannot be changed: it was passed over all the same
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

    def is_new(self) -> bool:
        """Whether there has never been a checkpoint, not even one that was damaged."""
        return not self.present() and not self.damaged()

    def remove(self, path: Path) -> None:
        """Delete a checkpoint: its name vanishes at once, so that no half-deleted directory ever looks like one."""
        doomed = self.root / f".{path.name}.deleted"
        path.rename(doomed)
        erase(doomed)

    def recover(self) -> None:
        """Undo the replacement of a checkpoint that was killed between its two renames. For the run itself only."""
        for path in self.root.glob(".step_*.retired"):
            match = _RETIRED.fullmatch(path.name)
            if match is None:
                continue
            final = self.root / match[1]
            if final.exists():
                with suppress(OSError):  # a reader has a file of it open: removed next time
                    erase(path)
            else:
                path.rename(final)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def erase(path: Path) -> None:
    """Delete a directory with all that is in it, or a file; of a symbolic link, the link."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def warn_of_damage(path: Path, damage: Exception) -> None:
    """Say that a checkpoint is passed over."""
    _log.warning("checkpoint %s is damaged: %s; falling back to the one before it", path, damage)


def _saved(document: Manifest) -> Saved:
    return Saved(document.step, document.state.get("tokens"), document.state.get("validation_loss"))
