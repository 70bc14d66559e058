"""Compiled kernels on the node's own disk: thousands of small files that a shared one serves slowly.

A start fills a fresh directory from one archive in the run directory; the first node packs it again at a good end.
"""

from __future__ import annotations

import os
import shutil
import tarfile
import tempfile
from pathlib import Path

ARCHIVE = "jit_cache.tar"
VARIABLE = "NEMOTRON3_KERNEL_CACHE"
"""``platform.kernel_cache.CACHE_VARIABLE``; importing it would import Megatron-Core into torchrun's process."""


def fill(run_dir: Path, parent: str | None) -> Path | None:
    """Make a directory below ``parent`` that only this user can enter, fill it, and name it to the ranks.

    Returns:
        The directory, or None where ``parent`` is None.
    """
    if not parent:
        return None
    cache = Path(tempfile.mkdtemp(prefix="nemotron3-jit-", dir=parent))
    if (archive := run_dir / ARCHIVE).is_file():
        with tarfile.open(archive) as packed:
            packed.extractall(cache, filter="data")  # nothing that would land elsewhere
    os.environ[VARIABLE] = str(cache)
    return cache


def keep(run_dir: Path, cache: Path) -> None:
    """Pack the directory into the run directory, in one step for those who read it."""
    partial = run_dir / f"{ARCHIVE}.partial"
    with tarfile.open(partial, "w") as packed:
        packed.add(cache, arcname=".")
    partial.replace(run_dir / ARCHIVE)


def discard(cache: Path | None) -> None:
    """Remove the directory."""
    if cache is not None:
        shutil.rmtree(cache, ignore_errors=True)
