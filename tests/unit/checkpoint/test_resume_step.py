"""Which step a start continues from, seen without a process group: as the store itself would choose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory
from nemotron3_megatron.checkpoint.manifest import FileRecord, Manifest
from nemotron3_megatron.checkpoint.resume import step_to_resume
from nemotron3_megatron.config import Recipe, UserError, compose


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return replace(compose(["recipe=tiny"])[0], run_dir=str(tmp_path))


def saved(folder: Path, step: int, *, name: str | None = None, size: int = 3) -> Path:
    """A checkpoint of one file; its manifest says 3 bytes."""
    path = folder / (name or f"step_{step:08d}")
    path.mkdir(parents=True)
    (path / "x").write_bytes(b"a" * size)
    files = {"x": FileRecord(3, 0)}
    manifest.write(Manifest(step=step, optimizer_step=step, layout={}, files=files, state={}), path)
    return path


def test_the_newest_complete_checkpoint_counts(recipe: Recipe, tmp_path: Path) -> None:
    assert step_to_resume(recipe) == 0
    folder = tmp_path / "checkpoints"
    elsewhere = saved(tmp_path / "other", 70)
    assert step_to_resume(replace(recipe, checkpoint=replace(recipe.checkpoint, load=str(elsewhere)))) == 70
    saved(folder, 4)
    saved(folder, 100_000_000)
    assert step_to_resume(recipe) == 100_000_000
    saved(folder, 200_000_000, size=2)  # truncated
    (folder / "step_300000000").mkdir()  # never completed
    saved(folder, 400_000_000, name=".step_400000000.abc.partial")
    assert step_to_resume(replace(recipe, checkpoint=replace(recipe.checkpoint, load=str(elsewhere)))) == 100_000_000
    assert next(CheckpointDirectory(tmp_path).complete()).name == "step_100000000"


def test_a_replacement_that_was_cut_short_counts(recipe: Recipe, tmp_path: Path) -> None:
    saved(tmp_path / "checkpoints", 4)
    saved(tmp_path / "checkpoints", 8, name=".step_00000008.retired")
    assert step_to_resume(recipe) == 8
    directory = CheckpointDirectory(tmp_path)
    directory.recover()  # as every start does
    assert next(directory.complete()).name == "step_00000008"


def test_only_planning_names_a_stage(recipe: Recipe) -> None:
    with pytest.raises(UserError, match="stage=main"):
        step_to_resume(replace(recipe, stage="main"))
