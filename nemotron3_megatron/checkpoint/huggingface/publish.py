"""A directory that exists completely or not at all."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from glob import escape
from pathlib import Path

from nemotron3_megatron.checkpoint.claim import one_at_a_time
from nemotron3_megatron.checkpoint.manifest import sync
from nemotron3_megatron.config.errors import UserError


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` that becomes ``out`` when the block ends without an error.

    Of several processes that write the same ``out``, the first to end has it.

    Raises:
        UserError: ``out`` exists and is not an empty directory (it is left as it is), or cannot be written.
    """
    out = out.resolve()
    try:
        if out.exists() and not (out.is_dir() and not any(out.iterdir())):
            raise UserError(f"out={out}", why="exists and is not an empty directory", nearest="a new directory")
        out.parent.mkdir(parents=True, exist_ok=True)
        with _scratch(out) as partial:
            yield partial
            for path in partial.iterdir():
                sync(path)
            sync(partial)
            partial.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"out={out}", why=f"it could not be written: {error.strerror or error}") from error


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A new directory of this call's own, locked while its process lives; those of dead processes are removed."""
    with one_at_a_time(out.parent):
        for left in out.parent.glob(f".{escape(out.name)}.*.partial"):
            with suppress(OSError), _locked(left):
                shutil.rmtree(left)
        partial = out.parent / f".{out.name}.{secrets.token_hex(4)}.partial"
        partial.mkdir()
        lock = os.open(partial, os.O_RDONLY)
        with suppress(OSError):  # a file system without locks: leftovers stay
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # unless it is ``out`` by now
        os.close(lock)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold a directory's lock; OSError: another process has it."""
    lock = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(lock)
