"""A directory that exists completely or not at all."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nemotron3_megatron.checkpoint.manifest import sync
from nemotron3_megatron.config.errors import UserError


@contextmanager
def published(out: Path) -> Iterator[Path]:
    """A hidden directory beside ``out`` that becomes ``out`` when the block ends without an error.

    Raises:
        UserError: ``out`` exists and is not an empty directory; it is left as it is.
    """
    out = out.absolute()
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise UserError(f"out={out}", why="exists and is not an empty directory", nearest="a new directory")
    partial = out.parent / f".{out.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        for path in partial.iterdir():
            sync(path)
        sync(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"out={out}", why=f"it could not be written: {error.strerror or error}") from error
        raise
    sync(out.parent)
