"""Documents of a WARC file: extracted text (WET) as it is, HTML pages through trafilatura."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from typing import IO, Any

from data_prep.libraries import library
from data_prep.readers import Defect, Document, brief, document

_HTML = ("text/html", "application/xhtml+xml")
_READ_BYTES = 1 << 16


def read_warc(stream: IO[bytes], raw: IO[bytes], name: str) -> Iterator[Document | Defect]:
    """One document for each ``conversion`` record and each ``response`` record that is HTML.

    Other records (requests, metadata, images) hold no text and are passed over. A page without main text is an empty
    document.
    """
    loading_failed = library("warcio.exceptions").ArchiveLoadFailed
    # The stream is unpacked already: warcio ends a truncated gzip file without an error. HTTP is parsed here: warcio
    # takes a response without any for the end of the archive.
    records = library("warcio.archiveiterator").ArchiveIterator(_Unpacked(stream), no_record_parse=True)
    number = misplaced = 0
    try:
        for record in chain(records, (None,)):
            if records.err_count > misplaced:
                yield Defect(
                    f"{name}: record {number}", "the file is damaged: the record's length is wrong", raw.tell()
                )
                misplaced = records.err_count
            if record is not None:
                number += 1
                yield from _of_record(record, f"{name}: record {number}", raw)
    except loading_failed as error:
        yield Defect(f"{name}: record {number + 1}", f"the file is damaged: {brief(error)}", raw.tell())


def _of_record(record: Any, where: str, raw: IO[bytes]) -> Iterator[Document | Defect]:
    """What one record gives, if anything. All of it is read, to see whether the file ends inside."""
    length = record.rec_headers.get_header("Content-Length")
    if record.rec_type is None or length is None or not length.isdigit():
        yield Defect(where, "the file is damaged: a header without type or length", raw.tell())
        return
    page = record.rec_type == "response" and _is_html(record)
    data = record.content_stream().read() if page or record.rec_type == "conversion" else b""
    while record.raw_stream.read(_READ_BYTES):
        pass
    if missing := record.raw_stream.limit:
        yield Defect(where, f"the file is damaged: {missing} bytes of the record are missing", raw.tell())
    elif page:
        yield _page(data, where, raw.tell())
    elif record.rec_type == "conversion":
        yield document(data, where, raw.tell())


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
    """Whether a response is a page; parses its HTTP headers."""
    if str(record.rec_headers.get_header("Content-Type")).startswith("application/http"):
        parser = library("warcio.statusandheaders").StatusAndHeadersParser([], verify=False)
        with suppress(EOFError):  # there is nothing behind the record's header
            record.http_headers = parser.parse(record.raw_stream)
    kind = record.rec_headers.get_header("WARC-Identified-Payload-Type")
    if kind is None and record.http_headers is not None:
        kind = record.http_headers.get_header("Content-Type")
    return kind is not None and kind.split(";")[0].strip().lower() in _HTML


def _page(data: bytes, where: str, position: int) -> Document:
    text = library("trafilatura").extract(data, favor_precision=True)
    return Document(text or "", where, position)
