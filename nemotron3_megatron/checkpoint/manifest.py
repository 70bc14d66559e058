"""The manifest: the last file written into a checkpoint, whose presence makes it complete.

It holds what is not a tensor (step, training state, layout) and the size of every other file, so that a
truncated or missing file is seen without reading the data, on any machine and without Megatron.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
FORMAT = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is known about a checkpoint without reading its tensors."""

    step: int
    """Optimizer steps of the run when it was saved."""
    optimizer_step: int | None
    """Updates that Adam has made (differs from ``step`` by the skipped ones); None: no optimizer was saved."""
    layout: dict[str, int]
    """World size and parallel sizes it was saved under."""
    files: dict[str, int]
    """Size in bytes of every other file, by path relative to the checkpoint."""
    state: dict[str, Any]
    """The training state handed to ``save``: JSON values only."""
    format: int = FORMAT


def file_sizes(directory: Path) -> dict[str, int]:
    """Sizes in bytes of all files under ``directory``, without the manifest."""
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.stat().st_size for path in files if path.name != FILE_NAME}


def write(manifest: Manifest, directory: Path) -> None:
    """Write the manifest and force it, and the names in ``directory``, to disk."""
    with open(directory / FILE_NAME, "w", encoding="utf-8") as file:
        json.dump(asdict(manifest), file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync_directory(directory)


def read(directory: Path) -> Manifest:
    """The manifest of the checkpoint in ``directory``.

    Raises:
        ValueError: it is missing, unreadable or of another format; the message says which.
    """
    try:
        fields = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"{FILE_NAME} has format {fields['format']}, this version reads format {FORMAT}")
        return Manifest(**fields)
    except FileNotFoundError:
        raise ValueError(f"it has no {FILE_NAME}, so it was never completed") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{FILE_NAME} cannot be read ({error})") from None


def verify(directory: Path) -> Manifest:
    """The manifest, once every file it lists is there in its full size.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; the message names the first such file.
    """
    manifest = read(directory)
    for name, size in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size:,} of {size:,} bytes")
    return manifest


def sync_directory(directory: Path) -> None:
    """Force the entries of ``directory`` (creations, renames) to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
