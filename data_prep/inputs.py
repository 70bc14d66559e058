"""The input files of a recipe, in a fixed order, and their grouping into shards."""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import logging
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.hub import HUB, download
from data_prep.recipe import Format, InputConfig
from nemotron3_megatron.config.errors import UserError

logger = logging.getLogger(__name__)

STDLIB = "python-stdlib"

# Left out of the standard library: tests (not always installed), other people's packages, build leftovers, and what
# is generated: the tables of character encodings and the manual, whose one file would be a tenth of the corpus.
_STDLIB_LEFT_OUT = frozenset(
    ("test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data", "__pycache__")
)

_COMPRESSED = (".gz", ".zst")
_PROSE = ".txt .md .rst .tex .adoc"
_CODE = (
    ".py .pyi .pyx .c .h .cc .cpp .cxx .hh .hpp .cu .cuh .S .s .rs .go .java .kt .scala .js .jsx .ts .tsx .mjs .cs "
    ".swift .rb .php .pl .lua .jl .r .R .hs .ml .erl .ex .exs .clj .dart .f90 .sh .sql .proto .cmake"
)
_FORMATS: dict[str, Format] = {
    **dict.fromkeys(f"{_PROSE} {_CODE}".split(), "text"),
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".warc": "warc",
    ".wet": "warc",
}


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to read."""

    path: Path
    name: str
    """Path below the entry of ``input.paths`` it was found by: how messages and the manifest call it."""
    format: Format
    size: int
    """Bytes on disk."""


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file was when it was read."""

    name: str
    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, file: InputFile) -> FileRecord:
        """Record a file as it is now."""
        mtime_ns = file.path.stat().st_mtime_ns
        with file.path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(file.name, file.size, mtime_ns, digest)

    def still_describes(self, file: InputFile) -> bool:
        """True when the file has not changed since: same time of change, or else the same content."""
        if (self.name, self.size) != (file.name, file.size):
            return False
        return self.mtime_ns == file.path.stat().st_mtime_ns or self.sha256 == FileRecord.of(file).sha256


def unchanged(records: Sequence[FileRecord], files: Sequence[InputFile]) -> bool:
    """True when the files are those that were recorded, in the same order."""
    same = len(records) == len(files)
    return same and all(record.still_describes(file) for record, file in zip(records, files, strict=True))


def discover(config: InputConfig) -> list[InputFile]:
    """Every input file, sorted inside each entry of ``input.paths``.

    Files of unknown kind in a directory are left out with a warning; a link to another file of the directory, whose
    text is there already, is left out.

    Raises:
        UserError: a path does not exist, is of unknown kind, is named twice, or nothing is found at all.
    """
    found: list[InputFile] = []
    for entry in config.paths:
        found += _entry(entry, config.format)
    seen: set[Path] = set()
    for file in found:
        resolved = file.path.resolve()
        if resolved in seen:
            raise UserError(f"input.paths names {file.path} twice", why="its text would count twice")
        seen.add(resolved)
    if not found:
        raise UserError(f"input.paths=[{', '.join(config.paths)}]", why="no readable file was found there")
    return found


def group(
    files: Sequence[InputFile], shard_bytes: int, together: Callable[[InputFile], object] = lambda file: file.path
) -> list[tuple[InputFile, ...]]:
    """Neighbouring files in groups of at most ``shard_bytes``.

    Neighbours for which ``together`` is equal are never parted; what is larger is a group of its own.
    """
    groups: list[list[InputFile]] = [[]]
    filled = 0
    for _, same in itertools.groupby(files, together):
        members = list(same)
        size = sum(file.size for file in members)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1] += members
        filled += size
    return [tuple(members) for members in groups if members]


def _entry(entry: str, chosen: Format) -> list[InputFile]:
    if entry == STDLIB:
        return [_file(path, root, "text") for root, path in _standard_library()]
    path = download(entry) if entry.startswith(HUB) else Path(entry)
    if path.is_dir():
        return _directory(path, chosen)
    paths = [path] if path.exists() else [Path(match) for match in sorted(glob.glob(entry, recursive=True))]
    if not paths:
        present = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(entry, present, n=1)
        raise UserError(f"input.paths: {entry} does not exist", nearest=close[0] if close else None)
    files = []
    for match in (match for match in paths if match.is_file()):
        kind = _format(match, chosen)
        if kind is None:
            known = ", ".join(sorted(_FORMATS))
            raise UserError(
                f"{match} is of unknown kind",
                why=f"known suffixes are {known}, also with .gz or .zst",
                nearest="input.format=text (or jsonl, parquet, arrow, warc)",
            )
        files.append(_file(match, match.parent, kind))
    return files


def _directory(directory: Path, chosen: Format) -> list[InputFile]:
    files, left_out = [], []
    for path in sorted(directory.rglob("*")):
        hidden = any(part.startswith(".") for part in path.relative_to(directory).parts)
        if hidden or not path.is_file():
            continue
        kind = _format(path, chosen)
        if kind is None:
            left_out.append(path.name)
        else:
            files.append(_file(path, directory, kind))
    if left_out:
        examples = ", ".join(left_out[:5])
        logger.warning("%s: %d files of unknown kind are left out (%s ...)", directory, len(left_out), examples)
    inodes = [(file, file.path.stat(), file.path.is_symlink()) for file in files]
    own = {(stat.st_dev, stat.st_ino) for _, stat, link in inodes if not link}
    return [file for file, stat, link in inodes if not link or (stat.st_dev, stat.st_ino) not in own]


def _standard_library() -> Iterator[tuple[Path, Path]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parents = path.relative_to(root).parts[:-1]
        left_out = _STDLIB_LEFT_OUT.intersection(parents) or any(part.startswith("config-") for part in parents)
        if not left_out and not path.name.startswith("_sysconfigdata"):
            yield root, path


def _file(path: Path, root: Path, kind: Format) -> InputFile:
    return InputFile(path, path.relative_to(root).as_posix(), kind, path.stat().st_size)


def _format(path: Path, chosen: Format) -> Format | None:
    if chosen != "auto":
        return chosen
    suffixes = [suffix for suffix in path.suffixes if suffix not in _COMPRESSED]
    return _FORMATS.get(suffixes[-1]) if suffixes else None
