"""A directory appears whole or not at all, whoever else writes it, and whatever the disk says."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import torch

from nemotron3_megatron.checkpoint.huggingface.mapping import Box
from nemotron3_megatron.checkpoint.huggingface.publish import published
from nemotron3_megatron.checkpoint.huggingface.shards import Item, Spec, write_shards
from nemotron3_megatron.checkpoint.huggingface.writing import Chunk, write_checkpoint
from nemotron3_megatron.config.errors import UserError

TENSOR = torch.ones(512, 512)  # 1 MiB


def test_of_two_writers_one_publishes_and_nothing_is_mixed(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def early() -> None:
        with published(out) as directory:
            (directory / "weights").write_text("early")

    def late() -> None:
        with published(out) as directory:
            (directory / "weights").write_text("late")
            early()

    with pytest.raises(UserError, match="Directory not empty"):
        late()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (out / "weights").read_text() == "early"


def test_what_a_killed_process_leaves_is_removed_and_a_living_one_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out [1]"
    other = subprocess.Popen([sys.executable, __file__, str(out)])
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(".out *.partial/ready")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert _refused(out) == 2
        assert len(list(tmp_path.glob(".out *.partial/ready"))) == 1
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.wait()
    with published(out):
        assert len(list(tmp_path.glob(".out *.partial"))) == 1
    assert [path.name for path in tmp_path.iterdir()] == [out.name]


def test_an_interrupted_one_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), published(tmp_path / "out"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_a_link_to_an_empty_directory_is_filled(tmp_path: Path) -> None:
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "large_disk")
    with published(tmp_path / "out") as directory:
        (directory / "weights").touch()
    assert (tmp_path / "large_disk" / "weights").is_file()


@pytest.mark.parametrize("name", ["file/out", "n" * 300])
def test_a_place_that_cannot_be_written(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="could not be written"), published(tmp_path / name):
        pass


def test_a_full_disk(tmp_path: Path) -> None:
    """As safetensors and as torch tell of it."""
    item = Item((Spec("weight", (512, 512), torch.float32),), lambda: [TENSOR])
    chunk = Chunk(Box("weight", (0, 0), (512, 512)), (512, 512), torch.float32, lambda: TENSOR)
    out, full = tmp_path / "out", partial(_files_of_at_most, 2**16)
    with pytest.raises(UserError, match=r"could not be written.*File too large"), published(out) as path, full():
        write_shards([item], path, 2**30)
    with pytest.raises(UserError, match="could not be written: File too large"), published(out) as path, full():
        write_checkpoint([chunk], path, 2**30)
    assert not list(tmp_path.iterdir())


def test_files_can_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    item = Item((Spec("weight", (512, 512), torch.float32),), lambda: [TENSOR])
    before = os.umask(0o027)
    try:
        with published(tmp_path / "out") as directory:
            write_shards([item], directory, 2**30)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def _refused(out: Path) -> int:
    """Begin and give up; how many directories there were meanwhile."""
    with suppress(KeyError), published(out):
        found = len(list(out.parent.glob(".out *.partial")))
        raise KeyError
    return found


@contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


if __name__ == "__main__":
    with published(Path(sys.argv[1])) as mine:
        (mine / "ready").touch()
        time.sleep(600)
