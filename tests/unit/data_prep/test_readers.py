"""Every format yields the same documents; what is damaged is named, never passed over."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from data_prep.inputs import InputFile
from data_prep.readers import Defect, Document, Keys, read
from data_prep.recipe import Format

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def items(path: Path, kind: Format, field: str = "text") -> list[Document | Defect]:
    return list(read(InputFile(path, path.name, kind, path.stat().st_size), Keys(field)))


def texts_of(path: Path, kind: Format, field: str = "text") -> list[str]:
    return [item.text if isinstance(item, Document) else "DEFECT" for item in items(path, kind, field)]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl(write_jsonl, texts, suffix) -> None:
    assert texts_of(write_jsonl(f"a.jsonl{suffix}", texts), "jsonl") == texts
    assert texts_of(write_jsonl(f"b.jsonl{suffix}", texts, field="content"), "jsonl", "content") == texts


@pytest.mark.parametrize("kind", ["string", "large_string"])
def test_parquet(tmp_path: Path, texts, kind: str) -> None:
    column = pa.array(texts, type=getattr(pa, kind)())
    pq.write_table(pa.table({"id": list(range(len(texts))), "text": column}), tmp_path / "a.parquet", row_group_size=7)
    assert texts_of(tmp_path / "a.parquet", "parquet") == texts


def test_text_is_the_whole_file_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("first\r\n\n é\n".encode())
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfmarked")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"packed"))
    assert texts_of(tmp_path / "a.txt", "text") == ["first\r\n\n é\n"]
    assert texts_of(tmp_path / "b.txt", "text") == ["marked"]
    assert texts_of(tmp_path / "c.txt.gz", "text") == ["packed"]


def test_positions_lead_to_the_end_of_the_file(write_jsonl, texts) -> None:
    path = write_jsonl("a.jsonl", texts * 40)
    positions = [item.position for item in items(path, "jsonl")]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b'{"text": "cut', "not JSON"),
        (b'{"other": 1}', "no key 'text': it has other"),
        (b'["text"]', "it is no object"),
        (b'{"text": null}', "'text' is NoneType"),
        (b'{"text": "\\ud800"}', "not valid Unicode"),
        (b'{"text": "\xff"}', "not JSON"),
        (b"[" * 200_000, "not JSON: maximum recursion depth"),
    ],
)
def test_a_defective_line_is_named_and_the_rest_is_read(tmp_path: Path, line: bytes, why: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    first, defect, last = items(path, "jsonl")
    assert isinstance(first, Document)
    assert isinstance(last, Document)
    assert isinstance(defect, Defect)
    assert defect.where == "a.jsonl:3"
    assert why in defect.why


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("cut", [3, 40])
def test_truncated_archive(write_jsonl, texts, suffix: str, cut: int) -> None:
    path = write_jsonl(f"a.jsonl{suffix}", texts * 50)
    path.write_bytes(path.read_bytes()[:-cut])
    last = items(path, "jsonl")[-1]
    assert isinstance(last, Defect)
    assert "damaged" in last.why


@pytest.mark.parametrize(("name", "kind"), [("a.gz", "jsonl"), ("a.zst", "jsonl"), ("a.parquet", "parquet")])
def test_garbage(tmp_path: Path, name: str, kind: Format) -> None:
    (tmp_path / name).write_bytes(b"this is neither an archive nor a table" * 5)
    (defect,) = items(tmp_path / name, kind)
    assert isinstance(defect, Defect)
    assert "damaged" in defect.why


def test_defective_text_and_parquet(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff bad")
    (defect,) = items(tmp_path / "a.txt", "text")
    assert isinstance(defect, Defect)
    assert "not UTF-8 at byte 5" in defect.why

    pq.write_table(pa.table({"text": ["one", None, "two"], "n": [1, 2, 3]}), tmp_path / "a.parquet")
    one, null, two = items(tmp_path / "a.parquet", "parquet")
    assert isinstance(one, Document)
    assert isinstance(two, Document)
    assert isinstance(null, Defect)
    assert null.where == "a.parquet: row 2"
    (missing,) = items(tmp_path / "a.parquet", "parquet", "body")
    assert isinstance(missing, Defect)
    assert "it has text, n" in missing.why
    (numbers,) = {item.why for item in items(tmp_path / "a.parquet", "parquet", "n") if isinstance(item, Defect)}
    assert "int, not text" in numbers


def test_one_json_text_per_line_means_what_json_says(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": 'tab\t quote" é \n line'}) + "\n")
    assert texts_of(tmp_path / "a.jsonl", "jsonl") == ['tab\t quote" é \n line']
