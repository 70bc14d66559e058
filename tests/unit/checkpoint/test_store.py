"""Which checkpoint is the newest good one, what is deleted, and what a killed process may leave behind."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.checkpoint.retention import Retention
from nemotron3_megatron.checkpoint.store import CheckpointStore, load_state
from nemotron3_megatron.config.errors import UserError


def _write(path: Path, step: int) -> Path:
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"data")
    files = {"data": manifest.record(path / "data")}
    manifest.write(Manifest(step=step, optimizer_step=step, layout={}, files=files, state={"step": step}), path)
    return path


def _steps(run_dir: Path, *steps: int) -> list[Path]:
    return [_write(run_dir / "checkpoints" / f"step_{step:08d}", step) for step in steps]


def test_no_checkpoint(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "never made").newest() is None


def test_newest_is_by_number(tmp_path: Path) -> None:
    paths = _steps(tmp_path, 99_999_999, 5, 100_000_000)
    assert CheckpointStore(tmp_path).newest() == paths[2]


def test_others_are_ignored(tmp_path: Path) -> None:
    (good,) = _steps(tmp_path, 5)
    for name in (".step_00000009.partial", "step_00000009.bak", "step_9", ".step_00000008.deleted", "best"):
        _write(good.parent / name, 9)
    assert CheckpointStore(tmp_path).newest() == good


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: (path / "data").write_bytes(b"dat"), "data has 3 of 4 bytes"),
        (lambda path: (path / "data").unlink(), "data is missing"),
        (lambda path: (path / manifest.FILE_NAME).unlink(), "never completed"),
        (lambda path: (path / manifest.FILE_NAME).write_text("{"), "cannot be read"),
    ],
)
def test_damaged_ones_are_passed_over_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: object, reason: str
) -> None:
    good, bad = _steps(tmp_path, 5, 10)
    damage(bad)  # type: ignore[operator]
    with caplog.at_level(logging.WARNING):
        assert CheckpointStore(tmp_path).newest() == good
    (message,) = caplog.messages
    assert "step_00000010 is damaged" in message
    assert reason in message
    assert "falling back" in message


def test_load_state_needs_no_process_group(tmp_path: Path) -> None:
    (path,) = _steps(tmp_path, 5)
    assert load_state(path) == {"step": 5}
    (path / "data").unlink()
    with pytest.raises(UserError, match="not complete: data is missing"):
        load_state(path)
    with pytest.raises(UserError, match="does not exist"):
        load_state(tmp_path / "nothing")


def test_retention_counts_complete_ones_only(tmp_path: Path) -> None:
    paths = _steps(tmp_path, 1, 2, 3, 4)
    (paths[3] / "data").unlink()
    CheckpointDirectory(tmp_path).retain(Retention(2))
    assert sorted(path.name for path in paths[0].parent.iterdir()) == [
        "step_00000002",
        "step_00000003",
        "step_00000004",
    ]


def test_retention_never_deletes_the_last(tmp_path: Path) -> None:
    (path,) = _steps(tmp_path, 1)
    CheckpointDirectory(tmp_path).retain(Retention(0))
    assert path.is_dir()


def test_killed_between_retiring_and_replacing(tmp_path: Path) -> None:
    (path,) = _steps(tmp_path, 5)
    retired = path.with_name(".step_00000005.retired")
    path.rename(retired)
    assert CheckpointStore(tmp_path).newest() == path
    assert not retired.exists()


def test_killed_before_the_retired_one_is_removed(tmp_path: Path) -> None:
    (path,) = _steps(tmp_path, 5)
    retired = _write(path.with_name(".step_00000005.retired"), 4)
    assert load_state(CheckpointStore(tmp_path).newest() or tmp_path) == {"step": 5}
    assert not retired.exists()


def test_leftovers_are_swept_before_a_save(tmp_path: Path) -> None:
    (path,) = _steps(tmp_path, 5)
    for name in (".step_00000007.0aF.partial", ".step_00000003.deleted"):
        _write(path.parent / name, 1)
    CheckpointDirectory(tmp_path).make_room(6, "abc")
    assert sorted(found.name for found in path.parent.iterdir()) == [".step_00000006.abc.partial", "step_00000005"]


def test_retention_removes_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    """An old checkpoint that was moved to a slower disk."""
    old, new = _steps(tmp_path, 1, 2)
    moved = tmp_path / "archive"
    old.rename(moved)
    old.symlink_to(moved)
    CheckpointDirectory(tmp_path).retain(Retention(1))
    assert [path.name for path in new.parent.iterdir()] == [new.name]
    assert sorted(path.name for path in moved.iterdir()) == ["data", "manifest.json"]


def test_a_checkpoint_that_cannot_be_removed_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """On a network file system a reader keeps the directory from becoming empty."""
    first, second, third = _steps(tmp_path, 1, 2, 3)
    _write(first.with_name(".step_00000001.deleted"), 1)
    CheckpointDirectory(tmp_path).retain(Retention(1))
    assert "step_00000001 could not be removed: Directory not empty" in caplog.text
    assert (first.is_dir(), second.is_dir(), third.is_dir()) == (True, False, True)
