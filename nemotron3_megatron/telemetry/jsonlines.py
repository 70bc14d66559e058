"""``metrics.jsonl`` and ``validation.jsonl``: the record of a run that every report is made from.

Each record is flushed as it is written, so a killed process loses none; :meth:`JsonLines.sync` makes them
survive a power cut too and is called before a checkpoint becomes visible. A resumed run drops the records
past its checkpoint (they are about to be written again), so the files read like those of a run that was
never interrupted.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol, Self, TextIO

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"

log = logging.getLogger(__name__)


class _Record(Protocol):
    @property
    def step(self) -> int: ...
    @classmethod
    def from_json(cls, text: str) -> Self: ...


class JsonLines:
    """Appends records to ``run_dir``.

    Args:
        run_dir: directory of the run; created when missing.
        resumed_step: optimizer steps in the checkpoint this start continues; records past it are dropped.
            None: a run from the beginning; records of an earlier run in the same directory are set aside.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        run_dir.mkdir(parents=True, exist_ok=True)
        self._run_dir = run_dir
        if resumed_step is None:
            set_aside(run_dir)
        else:
            self.truncate_after(run_dir, resumed_step)
        self._metrics = _append_to(run_dir / METRICS)
        self._validation = _append_to(run_dir / VALIDATION)

    @staticmethod
    def truncate_after(run_dir: Path, step: int) -> None:
        """Drop the records past optimizer step ``step`` and a last line torn by a kill; each file atomically."""
        for name in (METRICS, VALIDATION):
            if (path := run_dir / name).exists():
                _truncate_file(path, step)

    def write(self, record: StepRecord) -> None:
        """Append a step.

        Raises:
            UserError: the disk is full or the directory is gone.
        """
        self._append(self._metrics, record.to_json())

    def write_eval(self, record: EvalRecord) -> None:
        """Append a validation pass.

        Raises:
            UserError: the disk is full or the directory is gone.
        """
        self._append(self._validation, record.to_json())

    def sync(self) -> None:
        """Return when every record is on the disk itself."""
        for file in (self._metrics, self._validation):
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Sync and close; nothing may be written afterwards."""
        self.sync()
        self._metrics.close()
        self._validation.close()

    def _append(self, file: TextIO, line: str) -> None:
        try:
            file.write(line + "\n")  # one write call: the file is line-buffered
        except OSError as error:
            raise UserError(
                f"cannot write {file.name}",
                why=f"{error.strerror}; the run cannot go on without its record",
                nearest="make room, then start the same command: it resumes from the newest checkpoint",
            ) from error


def read_steps(run_dir: Path) -> list[StepRecord]:
    """The steps of a run in order; of a step recorded twice, the later record.

    Raises:
        UserError: there is no ``metrics.jsonl``.
    """
    path = run_dir / METRICS
    if not path.exists():
        raise UserError(f"run_dir={run_dir}", why=f"it holds no {METRICS}", nearest="the directory of a started run")
    return _read(path, StepRecord)


def read_some_steps(run_dir: Path) -> list[StepRecord]:
    """:func:`read_steps`, at least one.

    Raises:
        UserError: there is no ``metrics.jsonl``, or no step in it.
    """
    if not (steps := read_steps(run_dir)):
        raise UserError(f"run_dir={run_dir}", why="the run has no step yet", nearest="wait for its first step")
    return steps


def read_evals(run_dir: Path) -> list[EvalRecord]:
    """The validation passes of a run in order; empty when there was none."""
    path = run_dir / VALIDATION
    return _read(path, EvalRecord) if path.exists() else []


def set_aside(run_dir: Path) -> None:
    """Rename the records of an earlier run in ``run_dir`` to the first free ``*.<n>.jsonl``; nothing is lost."""
    found = [path for name in (METRICS, VALIDATION) if (path := run_dir / name).exists() and path.stat().st_size]
    if not found:
        return
    number = 1
    while any(path.with_suffix(f".{number}.jsonl").exists() for path in found):
        number += 1
    for path in found:
        kept = path.with_suffix(f".{number}.jsonl")
        path.rename(kept)
        log.warning("this start begins at step 0: the records of an earlier one are kept as %s", kept)


def _append_to(path: Path) -> TextIO:
    return path.open("a", encoding="utf-8", buffering=1)


def _read[R: _Record](path: Path, kind: type[R]) -> list[R]:
    by_step: dict[int, R] = {}
    for line in _complete_lines(path):
        record = kind.from_json(line)
        by_step[record.step] = record
    return [by_step[step] for step in sorted(by_step)]


def _complete_lines(path: Path) -> Iterator[str]:
    """Lines that hold a whole JSON object; others (torn by a kill or a full disk) are reported and left out."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                whole = line.endswith("\n") and isinstance(json.loads(line), dict)
            except ValueError:
                whole = False
            if whole:
                yield line
            else:
                log.warning("%s:%d is not a complete record and is left out", path, number)


def _truncate_file(path: Path, step: int) -> None:
    shorter = path.with_suffix(".jsonl.partial")
    with shorter.open("w", encoding="utf-8") as file:
        file.writelines(line for line in _complete_lines(path) if json.loads(line).get("step", 0) <= step)
        file.flush()
        os.fsync(file.fileno())
    shorter.replace(path)
    _sync_directory(path.parent)


def _sync_directory(path: Path) -> None:
    """Make a rename survive a power cut (POSIX: the directory entry is synced on its own)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
