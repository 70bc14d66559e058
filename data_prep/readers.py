"""Documents of an input file, whatever its format; what cannot be read comes out as a defect, never silently."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BufferedReader
from typing import IO, Any

from data_prep.inputs import InputFile
from data_prep.libraries import library

_ROWS_AT_A_TIME = 1024
_BUFFER_BYTES = 1 << 20

# Whatever a damaged file makes the decoders raise; pyarrow's errors are ValueErrors and OSErrors.
_DAMAGE = (OSError, EOFError, ValueError, zlib.error)


@dataclass(frozen=True, slots=True)
class Document:
    """A text with the place it comes from."""

    text: str
    """Encodable as UTF-8."""
    where: str
    position: int
    """Bytes of the input file used up so far (compressed bytes if it is compressed)."""
    fields: Mapping[str, object] = field(default_factory=dict)
    """The other keys or columns that were asked for."""


@dataclass(frozen=True, slots=True)
class Defect:
    """A part of the input that cannot be read."""

    where: str
    why: str
    position: int


@dataclass(frozen=True, slots=True)
class Keys:
    """What is read of a record."""

    text: str = "text"
    others: tuple[str, ...] = ()


def read(file: InputFile, keys: Keys) -> Iterator[Document | Defect]:
    """The documents of a file in order. After a defect of the file itself, such as a truncated archive, it ends."""
    position = 0
    try:
        for item in _READERS[file.format](file, keys):
            position = item.position
            yield item
    except _DAMAGE as error:
        yield Defect(file.name, f"the file is damaged: {brief(error)}", position)


def _read_text(file: InputFile, _: Keys) -> Iterator[Document | Defect]:
    with opened(file) as (stream, _raw):
        data = stream.read()
    yield document(data.removeprefix(b"\xef\xbb\xbf"), file.name, file.size)


def _read_jsonl(file: InputFile, keys: Keys) -> Iterator[Document | Defect]:
    with opened(file) as (stream, raw):
        for number, line in enumerate(stream, start=1):
            if line.strip():
                yield _json_document(line, keys, f"{file.name}:{number}", raw.tell())


def _json_document(line: bytes, keys: Keys, where: str, position: int) -> Document | Defect:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Defect(where, f"not JSON: {brief(error)}", position)
    if not isinstance(record, dict):
        return Defect(where, f"no key {keys.text!r}: it is no object", position)
    return _from_record(record, keys, where, position)


def _read_parquet(file: InputFile, keys: Keys) -> Iterator[Document | Defect]:
    table = library("pyarrow.parquet").ParquetFile(file.path)
    names = table.schema_arrow.names
    if keys.text not in names:
        yield Defect(file.name, f"no column {keys.text!r}: it has {', '.join(names)}", 0)
        return
    columns = [name for name in (keys.text, *keys.others) if name in names]
    batches = table.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=columns)
    yield from _rows(file, keys, batches, lambda number: file.size * number // table.metadata.num_rows)


def _read_arrow(file: InputFile, keys: Keys) -> Iterator[Document | Defect]:
    """A stream of record batches, as ``datasets.Dataset.save_to_disk`` writes them."""
    with file.path.open("rb") as raw, library("pyarrow").ipc.open_stream(raw) as reader:
        if keys.text not in reader.schema.names:
            yield Defect(file.name, f"no column {keys.text!r}: it has {', '.join(reader.schema.names)}", 0)
            return
        yield from _rows(file, keys, map(_whole, reader), lambda _: min(raw.tell(), file.size))
        if raw.read(1):
            yield Defect(file.name, "the file is damaged: its stream ends before the file does", file.size)


def _whole(batch: Any) -> Any:
    """A batch as it came from the disk, checked: what its offsets point to is read without a check afterwards."""
    batch.validate(full=True)
    return batch


def _rows(file: InputFile, keys: Keys, batches: Any, position_of: Any) -> Iterator[Document | Defect]:
    number = 0
    for batch in batches:
        columns = {name: batch.column(name) for name in (keys.text, *keys.others) if name in batch.schema.names}
        for row in range(batch.num_rows):
            number += 1
            where, position = f"{file.name}: row {number}", position_of(number)
            try:
                record = {name: column[row].as_py() for name, column in columns.items()}
            except UnicodeDecodeError as error:
                yield Defect(where, f"not UTF-8: {brief(error)}", position)
            else:
                yield _from_record(record, keys, where, position)


def _read_warc(file: InputFile, _: Keys) -> Iterator[Document | Defect]:
    from data_prep.warc import read_warc

    with opened(file) as (stream, raw):
        yield from read_warc(stream, raw, file.name)


_READERS = {
    "text": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
    "warc": _read_warc,
}


def _from_record(record: Mapping[str, object], keys: Keys, where: str, position: int) -> Document | Defect:
    if missing := [key for key in (keys.text, *keys.others) if key not in record]:
        return Defect(where, f"no key {missing[0]!r}: it has {', '.join(record)}", position)
    text = record[keys.text]
    if not isinstance(text, str):
        return Defect(where, f"{keys.text!r} is {type(text).__name__}, not text", position)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return Defect(where, f"not valid Unicode: {error.reason}", position)
    return Document(text, where, position, {key: record[key] for key in keys.others})


def document(data: bytes, where: str, position: int) -> Document | Defect:
    """UTF-8 as a document."""
    try:
        return Document(data.decode(), where, position)
    except UnicodeDecodeError as error:
        return Defect(where, f"not UTF-8 at byte {error.start}", position)


@contextmanager
def opened(file: InputFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """The unpacked stream, and the raw one whose ``tell`` is the progress."""
    with file.path.open("rb") as raw:
        if file.path.suffix == ".gz":
            with gzip.GzipFile(fileobj=raw) as unpacked:
                yield unpacked, raw  # type: ignore[misc]  # GzipFile reads like IO[bytes]
        elif file.path.suffix == ".zst":
            # pyarrow and not zstandard, whose stream reader ends a truncated file without an error
            with library("pyarrow").CompressedInputStream(raw, "zstd") as unpacked:
                yield BufferedReader(unpacked, _BUFFER_BYTES), raw
        else:
            yield raw, raw


def brief(error: BaseException) -> str:
    """The first line of a library's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
