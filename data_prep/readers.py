"""Documents of an input file, whatever its format; what cannot be read comes out as a defect, never silently."""

from __future__ import annotations

import gzip
import importlib
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from typing import IO, Any

from data_prep.inputs import InputFile
from nemotron3_megatron.config.errors import UserError

_ROWS_AT_A_TIME = 1024
_BUFFER_BYTES = 1 << 20

# Whatever a damaged file makes the decoders raise; pyarrow's errors are ValueErrors and OSErrors.
_DAMAGE = (OSError, EOFError, ValueError, zlib.error)


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the place it comes from."""

    text: bytes
    """UTF-8, checked."""
    where: str
    position: int
    """Bytes of the input file used up so far (compressed bytes if it is compressed)."""


@dataclass(frozen=True, slots=True)
class Defect:
    """A part of the input that cannot be read."""

    where: str
    why: str
    position: int


def read(file: InputFile, text_field: str) -> Iterator[Document | Defect]:
    """The documents of a file in order. After a defect of the file itself, such as a truncated archive, it ends."""
    position = 0
    try:
        for item in _READERS[file.format](file, text_field):
            position = item.position
            yield item
    except _DAMAGE as error:
        yield Defect(file.name, f"the file is damaged: {_brief(error)}", position)


def _read_text(file: InputFile, _: str) -> Iterator[Document | Defect]:
    with _opened(file) as (stream, _raw):
        data = stream.read()
    yield _document(data.removeprefix(b"\xef\xbb\xbf"), file.name, file.size)


def _read_jsonl(file: InputFile, text_field: str) -> Iterator[Document | Defect]:
    with _opened(file) as (stream, raw):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_document(line, text_field, f"{file.name}:{number}", raw.tell())


def _json_document(line: bytes, text_field: str, where: str, position: int) -> Document | Defect:
    try:
        record = json.loads(line)
    except ValueError as error:
        return Defect(where, f"not JSON: {_brief(error)}", position)
    if not isinstance(record, dict) or text_field not in record:
        has = f"it has {', '.join(record)}" if isinstance(record, dict) else "it is no object"
        return Defect(where, f"no key {text_field!r}: {has}", position)
    return _from_str(record[text_field], text_field, where, position)


def _read_parquet(file: InputFile, text_field: str) -> Iterator[Document | Defect]:
    table = _pyarrow("pyarrow.parquet").ParquetFile(file.path)
    names, rows = table.schema_arrow.names, table.metadata.num_rows
    if text_field not in names:
        yield Defect(file.name, f"no column {text_field!r}: it has {', '.join(names)}", 0)
        return
    number = 0
    for batch in table.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=[text_field]):
        for cell in batch.column(0):
            number += 1
            where, position = f"{file.name}: row {number}", file.size * number // rows
            try:
                value = cell.as_py()
            except UnicodeDecodeError as error:
                yield Defect(where, f"not UTF-8: {_brief(error)}", position)
            else:
                yield _from_str(value, text_field, where, position)


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "parquet": _read_parquet}


def _from_str(value: object, text_field: str, where: str, position: int) -> Document | Defect:
    if not isinstance(value, str):
        return Defect(where, f"{text_field!r} is {type(value).__name__}, not text", position)
    try:
        return Document(value.encode(), where, position)
    except UnicodeEncodeError as error:
        return Defect(where, f"not valid Unicode: {error.reason}", position)


def _document(data: bytes, where: str, position: int) -> Document | Defect:
    try:
        data.decode()
    except UnicodeDecodeError as error:
        return Defect(where, f"not UTF-8 at byte {error.start}", position)
    return Document(data, where, position)


@contextmanager
def _opened(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The unpacked stream, and the raw one whose ``tell`` is the progress."""
    with file.path.open("rb") as raw:
        if file.path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked, raw  # type: ignore[misc]  # GzipFile reads like IO[bytes]
        elif file.path.suffix == ".zst":
            # pyarrow and not zstandard, whose stream reader ends a truncated file without an error
            with _pyarrow("pyarrow").CompressedInputStream(raw, "zstd") as unpacked:
                yield BufferedReader(unpacked, _BUFFER_BYTES), raw
        else:
            yield raw, raw


def _pyarrow(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            "reading parquet and .zst needs the package pyarrow",
            why=str(error),
            nearest="pip install pyarrow (part of the extra [data])",
        ) from error


def _brief(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
