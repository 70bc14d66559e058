"""Documents of a WARC file: extracted text (WET) as it is, HTML pages through trafilatura."""

from __future__ import annotations

from collections.abc import Iterator
from typing import IO, Any

from data_prep.libraries import library
from data_prep.readers import Defect, Document, brief, document

_HTML = ("text/html", "application/xhtml+xml")


def read_warc(stream: IO[bytes], raw: IO[bytes], name: str) -> Iterator[Document | Defect]:
    """One document for each ``conversion`` record and each ``response`` record that is HTML.

    Other records (requests, metadata, images) hold no text and are passed over. A page without main text is an empty
    document.
    """
    loading_failed = library("warcio.exceptions").ArchiveLoadFailed
    # The stream is unpacked already: warcio ends a truncated gzip file without an error.
    records = library("warcio.archiveiterator").ArchiveIterator(_Unpacked(stream))
    number = 0
    try:
        for record in records:
            number += 1
            where = f"{name}: record {number}"
            if record.rec_type == "conversion":
                data = record.content_stream().read()
                yield _cut(record, where, raw.tell()) or document(data, where, raw.tell())
            elif record.rec_type == "response" and _is_html(record):
                data = record.content_stream().read()
                yield _cut(record, where, raw.tell()) or _page(data, where, raw.tell())
    except loading_failed as error:
        yield Defect(f"{name}: record {number + 1}", f"the file is damaged: {brief(error)}", raw.tell())


class _Unpacked:
    """A stream whose early end is an OSError: warcio takes EOFError for the end of the archive."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Read bytes."""
        try:
            return self._stream.read(size)
        except EOFError as error:
            raise OSError(str(error)) from error

    def tell(self) -> int:
        """Position in the unpacked stream."""
        return self._stream.tell()


def _is_html(record: Any) -> bool:
    kind = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    if kind is None and record.http_headers is not None:
        kind = record.http_headers.get_header("Content-Type")
    return kind is not None and kind.split(";")[0].strip().lower() in _HTML


def _cut(record: Any, where: str, position: int) -> Defect | None:
    """A defect when the file ends inside the record."""
    missing = record.raw_stream.limit
    return (
        Defect(where, f"the file is damaged: {missing} bytes of the record are missing", position) if missing else None
    )


def _page(data: bytes, where: str, position: int) -> Document:
    text = library("trafilatura").extract(data, favor_precision=True)
    return Document(text or "", where, position)
