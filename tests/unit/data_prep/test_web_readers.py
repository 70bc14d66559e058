"""WARC, Arrow and the Hugging Face hub."""

from __future__ import annotations

import gzip
import re
from io import BytesIO
from pathlib import Path

import pytest

from data_prep.hub import download
from data_prep.inputs import InputFile, discover
from data_prep.readers import Defect, Document, Keys, read
from data_prep.recipe import Format, InputConfig
from nemotron3_megatron.config.errors import UserError

pa = pytest.importorskip("pyarrow")
pytest.importorskip("trafilatura")
warcwriter = pytest.importorskip("warcio.warcwriter")
http = pytest.importorskip("warcio.statusandheaders")

SENTENCE = "The river rose slowly through the night and by morning the lower meadows lay under water. "
PAGE = f"<html><body><nav>Home | About</nav><article><h1>Flood</h1><p>{SENTENCE * 3}</p></article></body></html>"


def items(path: Path, kind: Format, keys: Keys | None = None) -> list[Document | Defect]:
    return list(read(InputFile(path, path.name, kind, path.stat().st_size), keys or Keys()))


def warc(compressed: bool) -> bytes:
    """A request, a page, an image and an extracted text."""
    stream = BytesIO()
    writer = warcwriter.WARCWriter(stream, gzip=compressed)

    def response(kind: str, payload: bytes) -> None:
        headers = http.StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.1")
        record = writer.create_warc_record("http://a.b/", "response", BytesIO(payload), http_headers=headers)
        writer.write_record(record)

    writer.write_record(writer.create_warc_record("http://a.b/", "metadata", BytesIO(b"fetched")))
    response("text/html; charset=utf-8", PAGE.encode())
    response("image/png", b"\x89PNG")
    writer.write_record(
        writer.create_warc_record(
            "http://a.b/", "conversion", BytesIO("naïve\n".encode()), warc_content_type="text/plain"
        )
    )
    return stream.getvalue()


@pytest.mark.parametrize("name", ["a.warc", "a.warc.gz", "a.warc.zst"])
def test_warc(tmp_path: Path, name: str) -> None:
    data = warc(name.endswith(".gz"))
    (tmp_path / name).write_bytes(pa.compress(data, codec="zstd", asbytes=True) if name.endswith(".zst") else data)
    page, extracted = items(tmp_path / name, "warc")
    assert isinstance(page, Document)
    assert SENTENCE.strip() in page.text
    assert "Home | About" not in page.text
    assert isinstance(extracted, Document)
    assert extracted.text == "naïve\n"
    assert extracted.where == f"{name}: record 4"


@pytest.mark.parametrize("compressed", [False, True])
def test_cut_warc_is_reported(tmp_path: Path, compressed: bool) -> None:
    """The last record loses its end; it must not come out as a shorter document."""
    path = tmp_path / ("a.warc.gz" if compressed else "a.warc")
    path.write_bytes(warc(compressed)[: -12 if compressed else -8])
    *before, defect = items(path, "warc")
    assert isinstance(defect, Defect)
    assert "damaged" in defect.why
    assert not [item for item in before if isinstance(item, Document) and SENTENCE not in item.text]


def test_wherever_a_warc_is_cut_the_loss_is_reported(tmp_path: Path) -> None:
    """In headers of the archive or of HTTP as in text; only between two records a cut cannot be seen."""
    whole = warc(compressed=False)
    _, *ends = [match.start() for match in re.finditer(rb"WARC/1.0\r\n|$", whole)]
    path = tmp_path / "a.warc"
    # Two line ends stand behind a record, without which it is complete. Not every place: pages take long.
    for length in [*range(2, 340), *range(340, len(whole), 17)]:
        if not any(end - 4 <= length <= end for end in ends):
            path.write_bytes(whole[:length])
            assert isinstance(items(path, "warc")[-1], Defect), length


@pytest.mark.parametrize(
    ("there", "instead", "documents"),
    [
        (b"WARC-Target-URI: http://a.b/\r\n", b"", 2),  # nothing that is needed
        (b"HTTP/1.1 200", b"HTTP/2 200", 2),
        (b"Content-Length", b"Content-Weight", 0),
        (b"WARC-Type", b"WARC-Kind", 0),
        (b"metadata", b"metatata", 2),
        (b"Content-Length: 7", b"Content-Length: 5", 2),  # of the first record, which holds "fetched"
    ],
)
def test_odd_headers_lose_no_other_record(tmp_path: Path, there: bytes, instead: bytes, documents: int) -> None:
    (tmp_path / "a.warc").write_bytes(warc(compressed=False).replace(there, instead))
    found = items(tmp_path / "a.warc", "warc")
    assert sum(isinstance(item, Document) for item in found) == documents, found


def test_garbage_is_no_warc(tmp_path: Path) -> None:
    (tmp_path / "a.warc").write_bytes(b"neither an archive\r\nnor a page\r\n" * 5)
    (tmp_path / "b.warc.gz").write_bytes(gzip.compress(b"x" * 50)[:-5])
    for name in ("a.warc", "b.warc.gz"):
        (defect,) = items(tmp_path / name, "warc")
        assert isinstance(defect, Defect)
        assert "damaged" in defect.why


def test_arrow_stream(tmp_path: Path, texts) -> None:
    """The layout of datasets.Dataset.save_to_disk: a stream of record batches in .arrow files."""
    table = pa.table({"text": texts, "repo": [f"r{i}" for i in range(len(texts))]})
    with (
        pa.OSFile(str(tmp_path / "data-00000-of-00001.arrow"), "wb") as sink,
        pa.ipc.new_stream(sink, table.schema) as w,
    ):
        w.write_table(table, max_chunksize=7)
    (tmp_path / "state.json").write_text("{}")
    (file,) = discover(InputConfig(paths=(str(tmp_path),)))
    read_back = list(read(file, Keys("text", ("repo",))))
    assert [(item.text, item.fields["repo"]) for item in read_back if isinstance(item, Document)] == [
        (text, f"r{i}") for i, text in enumerate(texts)
    ]
    whole = file.path.read_bytes()
    second = whole.index(b"\xff\xff\xff\xff", len(whole) // 2)  # a batch begins like this
    offsets = whole.index(bytes([0, 0, 0, 0, len(texts[0])]))  # of the first batch's texts
    for damaged in (
        whole[:-300],
        whole[:second] + bytes(8) + whole[second + 8 :],  # looks like the end of the stream
        whole[:offsets] + b"\xff\xff\xff\x7f" + whole[offsets + 4 :],  # points outside of the text
    ):
        file.path.write_bytes(damaged)
        last = list(read(file, Keys()))[-1]
        assert isinstance(last, Defect)
        assert "damaged" in last.why


def test_missing_field_is_a_defect(write_jsonl) -> None:
    (defect,) = items(write_jsonl("a.jsonl", ["one"]), "jsonl", Keys("text", ("repo",)))
    assert isinstance(defect, Defect)
    assert "no key 'repo'" in defect.why


def test_hub_dataset_from_its_cache(tmp_path: Path, monkeypatch, texts) -> None:
    """A dataset as huggingface_hub caches it, without the network."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    commit = "0" * 40
    repository = tmp_path / "datasets--someone--corpus"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    pq = pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": texts}), repository / "snapshots" / commit / "train-00000.parquet")
    (file,) = discover(InputConfig(paths=("hf://datasets/someone/corpus",)))
    assert [item.text for item in read(file, Keys()) if isinstance(item, Document)] == texts
    for entry, expected in [
        ("hf://datasets/someone", "nearest legal"),
        ("hf://datasets/no/such", "cannot be downloaded"),
    ]:
        with pytest.raises(UserError, match=expected):
            download(entry)
