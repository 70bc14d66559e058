"""Which files are read, in which order, and how they are grouped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from data_prep.inputs import FileRecord, InputFile, discover, group, unchanged
from data_prep.recipe import InputConfig
from nemotron3_megatron.config.errors import UserError


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "corpus"
    for name in ["b.txt", "a.jsonl", "deep/c.parquet", "deep/d.jsonl.zst", "deep/x.png", ".hidden/e.txt", "f.txt.gz"]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def found(*paths: Path | str, **settings) -> list[tuple[str, str]]:
    return [(file.name, file.format) for file in discover(InputConfig(paths=tuple(map(str, paths)), **settings))]


def test_directory_by_suffix(tree: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert found(tree) == [
        ("a.jsonl", "jsonl"),
        ("b.txt", "text"),
        ("deep/c.parquet", "parquet"),
        ("deep/d.jsonl.zst", "jsonl"),
        ("f.txt.gz", "text"),
    ]
    assert "1 files of unknown kind are left out (x.png" in caplog.text


def test_a_link_to_a_file_of_the_directory_counts_once(tree: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_text("elsewhere")
    (tree / "deep" / "again.txt").symlink_to("../b.txt")
    (tree / "image.txt").symlink_to("deep/x.png")
    (tree / "out.txt").symlink_to(tmp_path / "elsewhere")
    (tree / "dangling.txt").symlink_to("nowhere")
    names = [name for name, _ in found(tree)]
    assert names == ["a.jsonl", "b.txt", "deep/c.parquet", "deep/d.jsonl.zst", "f.txt.gz", "image.txt", "out.txt"]
    (tree / "out2.txt").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="twice"):
        found(tree)


def test_globs_files_and_a_chosen_format(tree: Path) -> None:
    assert found(tree / "deep" / "*.jsonl.zst", tree / "b.txt") == [("d.jsonl.zst", "jsonl"), ("b.txt", "text")]
    assert found(tree / "deep" / "x.png", format="text") == [("x.png", "text")]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["nowhere"], "does not exist"),
        (["deep/x.png"], "unknown kind"),
        (["b.txt", "*.txt"], "twice"),
        (["empty"], "no readable file"),
    ],
)
def test_unusable_paths(tree: Path, paths: list[str], expected: str) -> None:
    (tree / "empty").mkdir()
    with pytest.raises(UserError, match=expected):
        found(*(tree / path for path in paths))


def test_groups_keep_order_and_size() -> None:
    sizes = [4, 4, 3, 20, 1, 1, 9, 2]
    files = [InputFile(Path(f"{i}"), f"{i}", "text", size) for i, size in enumerate(sizes)]
    groups = group(files, 10)
    assert [[file.size for file in members] for members in groups] == [[4, 4], [3], [20], [1, 1], [9], [2]]
    assert [file for members in groups for file in members] == files


def test_standard_library_is_python_text_without_tests() -> None:
    names = [name for name, _ in found("python-stdlib")]
    assert {"argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if "/test/" in f"/{name}" or "site-packages" in name or "encodings/" in name]


def test_change_is_seen_by_content(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    file = InputFile(path, "a.txt", "text", 3)
    records = [FileRecord.of(file)]
    os.utime(path, ns=(1, 1))
    assert unchanged(records, [file])
    path.write_text("two")
    os.utime(path, ns=(2, 2))
    assert not unchanged(records, [file])
    assert not unchanged(records, [])
