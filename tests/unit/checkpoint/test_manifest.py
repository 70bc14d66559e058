"""The manifest tells complete checkpoints from all others."""

from __future__ import annotations

import json
import zlib
from pathlib import Path

import pytest

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.manifest import FileRecord, Manifest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    (tmp_path / "data").write_bytes(b"0123456789" * 1000)
    (tmp_path / "index").write_bytes(b"index")
    files = {name: manifest.record(tmp_path / name) for name in ("data", "index")}
    state = {"tokens": 2**60, "name": "æ", "nested": {"list": [1, 2.5, None, True]}}
    layout = {"world_size": 2, "tp": 1}
    manifest.write(Manifest(step=7, optimizer_step=6, layout=layout, files=files, state=state), tmp_path)
    return tmp_path


def test_round_trip(checkpoint: Path) -> None:
    found = manifest.verify(checkpoint)
    assert (found.step, found.optimizer_step, found.layout) == (7, 6, {"world_size": 2, "tp": 1})
    assert found.state == {"tokens": 2**60, "name": "æ", "nested": {"list": [1, 2.5, None, True]}}
    assert found.files["data"] == FileRecord(10_000, zlib.crc32(b"0123456789" * 1000))
    manifest.verify_contents(found, checkpoint)


def test_missing_file(checkpoint: Path) -> None:
    (checkpoint / "index").unlink()
    with pytest.raises(ValueError, match="index is missing"):
        manifest.verify(checkpoint)


def test_truncated_file(checkpoint: Path) -> None:
    (checkpoint / "data").write_bytes(b"0123")
    with pytest.raises(ValueError, match="data has 4 of 10,000 bytes"):
        manifest.verify(checkpoint)


def test_changed_byte_is_found_by_the_rank_that_reads_the_file(checkpoint: Path) -> None:
    data = bytearray((checkpoint / "data").read_bytes())
    data[5000] ^= 1
    (checkpoint / "data").write_bytes(data)
    found = manifest.verify(checkpoint)
    manifest.verify_contents(found, checkpoint, share=1, shares=2)
    with pytest.raises(ValueError, match="data is damaged"):
        manifest.verify_contents(found, checkpoint, share=0, shares=2)


def test_records_larger_than_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest, "_READ_BYTES", 7)
    (tmp_path / "file").write_bytes(b"0123456789" * 3)
    assert manifest.record(tmp_path / "file") == FileRecord(30, zlib.crc32(b"0123456789" * 3))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "{}", '{"format": 1}', '{"format": 1, "files": 3}', "\x00"])
def test_unreadable(checkpoint: Path, text: str) -> None:
    (checkpoint / manifest.FILE_NAME).write_text(text)
    with pytest.raises(ValueError, match="cannot be read"):
        manifest.read(checkpoint)


def test_absent(checkpoint: Path) -> None:
    (checkpoint / manifest.FILE_NAME).unlink()
    with pytest.raises(ValueError, match="never completed"):
        manifest.read(checkpoint)
    with pytest.raises(ValueError, match="does not exist"):
        manifest.read(checkpoint / "nowhere")


def test_other_format(checkpoint: Path) -> None:
    path = checkpoint / manifest.FILE_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(ValueError, match="has format 99, this version reads format 1"):
        manifest.read(checkpoint)


def test_no_changed_byte_of_the_manifest_is_believed(checkpoint: Path) -> None:
    """It holds the position in the data: a start must not go on from another one."""
    path = checkpoint / manifest.FILE_NAME
    written, good = path.read_bytes(), manifest.read(checkpoint)
    believed = []
    for place in range(len(written)):
        data = bytearray(written)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        try:
            found = manifest.read(checkpoint)
        except ValueError:
            continue
        if found != good:
            believed.append(place)
    assert not believed


def test_manifests_of_earlier_versions_have_no_checksum(checkpoint: Path) -> None:
    path = checkpoint / manifest.FILE_NAME
    fields = json.loads(path.read_text())
    good = manifest.read(checkpoint)
    del fields["crc32"]
    path.write_text(json.dumps(fields))
    assert manifest.read(checkpoint) == good
