"""The manifest: the last file written into a checkpoint, whose presence makes it complete.

It holds what is not a tensor (step, training state, layout), the size and checksum of every other file, and a
checksum of itself, so that damage is seen on any machine without Megatron: a truncated or missing file, or a changed
manifest, at once; other changed bytes by reading.
"""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "manifest.json"
FORMAT = 1

_CHECKSUM = "crc32"
_READ_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """A file as it was written."""

    bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Sample:
    """Fingerprint of a tensor as it was in the training process, not on disk (:func:`.writing.fingerprint`)."""

    key: str
    offset: tuple[int, ...]
    """Of the part that one rank wrote."""
    crc32: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What is known about a checkpoint without reading its tensors."""

    step: int
    """Optimizer steps of the run when it was saved."""
    optimizer_step: int | None
    """Updates that Adam has made (differs from ``step`` by the skipped ones); None: no optimizer was saved."""
    layout: dict[str, int]
    """World size and parallel sizes it was saved under."""
    files: dict[str, FileRecord]
    """Every other file, by path relative to the checkpoint."""
    state: dict[str, Any]
    """The training state handed to ``save``: JSON values only."""
    samples: tuple[Sample, ...] = ()
    """Of some live tensors; what is on disk was compared with them before the checkpoint became visible."""
    format: int = FORMAT


def record(path: Path) -> FileRecord:
    """Size and checksum of the file at ``path`` (reads it)."""
    size = checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            size, checksum = size + len(block), zlib.crc32(block, checksum)
    return FileRecord(size, checksum)


def write(manifest: Manifest, directory: Path) -> None:
    """Write the manifest and force it, and the names in ``directory``, to disk."""
    fields = json.loads(json.dumps(asdict(manifest)))  # as they will be read
    with open(directory / FILE_NAME, "w", encoding="utf-8") as file:
        json.dump({**fields, _CHECKSUM: _checksum(fields)}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    sync(directory)


def read(directory: Path) -> Manifest:
    """The manifest of the checkpoint in ``directory``.

    Raises:
        ValueError: it is missing, unreadable or of another format; the message says which.
    """
    try:
        fields = json.loads((directory / FILE_NAME).read_text(encoding="utf-8"))
        if fields["format"] != FORMAT:
            raise ValueError(f"{FILE_NAME} has format {fields['format']}, this version reads format {FORMAT}")
        # Manifests of earlier versions have none.
        if fields.pop(_CHECKSUM, None) not in (None, _checksum(fields)):
            raise ValueError(f"{FILE_NAME} is damaged (its checksum differs)")
        files = {name: FileRecord(**values) for name, values in fields.pop("files").items()}
        samples = tuple(Sample(s["key"], tuple(s["offset"]), s["crc32"]) for s in fields.pop("samples", ()))
        return Manifest(files=files, samples=samples, **fields)
    except FileNotFoundError:
        missing = f"it has no {FILE_NAME}, so it was never completed" if directory.is_dir() else "it does not exist"
        raise ValueError(missing) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{FILE_NAME} cannot be read ({error})") from None


def verify(directory: Path) -> Manifest:
    """The manifest, once every file it lists is there in its full size.

    Raises:
        ValueError: the checkpoint is incomplete or damaged; the message names the first such file.
    """
    manifest = read(directory)
    for name, written in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != written.bytes:
            raise ValueError(f"{name} has {path.stat().st_size:,} of {written.bytes:,} bytes")
    return manifest


def verify_contents(manifest: Manifest, directory: Path, *, share: int = 0, shares: int = 1) -> None:
    """Read every ``shares``-th file, beginning with the ``share``-th, and compare with its checksum.

    Raises:
        ValueError: bytes have changed since the file was written; the message names it.
    """
    for name in sorted(manifest.files)[share::shares]:
        verify_file(manifest, directory, name)


def verify_file(manifest: Manifest, directory: Path, name: str) -> None:
    """Read one file and compare with its checksum.

    Raises:
        ValueError: its bytes have changed since it was written.
    """
    if record(directory / name) != manifest.files.get(name):
        raise ValueError(f"{name} is damaged (its checksum differs)")


def _checksum(fields: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(fields, sort_keys=True).encode())


def sync(path: Path) -> None:
    """Force a file, or the entries of a directory (creations, renames), to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
