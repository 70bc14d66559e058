"""``nemotron3 checkpoint``: what is on disk, in words, as JSON, and as an exit status."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from nemotron3_megatron import cli
from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.claim import Claim
from nemotron3_megatron.checkpoint.manifest import Manifest, Sample
from nemotron3_megatron.checkpoint.writing import fingerprint


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three checkpoints; the newest has lost a file."""
    for step in (5, 10, 15):
        _write(tmp_path / "checkpoints" / f"step_{step:08d}", step)
    (tmp_path / "checkpoints" / "step_00000015" / "__0_0.distcp").unlink()
    return tmp_path


def test_ls(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "ls", str(run_dir), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["name"], row["tokens"], row["validation_loss"]) for row in rows] == [
        ("step_00000015", None, None),
        ("step_00000010", 1000, 2.5),
        ("step_00000005", 500, 2.5),
    ]
    assert rows[0]["damage"] == "__0_0.distcp is missing"
    assert cli.main(["checkpoint", "ls", str(run_dir)]) == 0
    text = capsys.readouterr().out
    assert "damaged: __0_0.distcp is missing" in text
    assert "4 ranks TP2 EP2" in text


def test_show(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = str(run_dir / "checkpoints" / "step_00000010")
    assert cli.main(["checkpoint", "show", place, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["step"] == 10
    assert found["tensors"] == [
        {"key": "optimizer.state.exp_avg.weight", "shape": [4, 3], "dtype": "float32"},
        {"key": "weight", "shape": [4, 3], "dtype": "bfloat16"},
    ]
    assert cli.main(["checkpoint", "show", place]) == 0
    assert "1 tensors, 12 elements" in capsys.readouterr().out
    assert cli.main(["checkpoint", "show", str(run_dir)]) == 2  # the newest is damaged
    assert "is damaged: __0_0.distcp is missing" in capsys.readouterr().err


def test_verify(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", "verify", str(run_dir)]) == 1
    assert [line.split(": ")[1] for line in capsys.readouterr().out.splitlines()] == ["damaged", "intact", "intact"]
    place = run_dir / "checkpoints" / "step_00000005"
    assert cli.main(["checkpoint", "verify", str(place)]) == 0
    _flip(place / "__0_0.distcp")
    assert cli.main(["checkpoint", "verify", str(place)]) == 1
    assert "__0_0.distcp is damaged (its checksum differs)" in capsys.readouterr().out


def test_verify_compares_with_the_live_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Checksums of the files agree, but what was written is not what was to be saved."""
    _write(tmp_path / "checkpoints" / "step_00000005", 5, live=torch.zeros(4, 3, dtype=torch.bfloat16))
    assert cli.main(["checkpoint", "verify", str(tmp_path)]) == 1
    assert "weight at [0, 0] is not what was to be saved" in capsys.readouterr().out


def test_rm(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "checkpoints"
    (root / ".step_00000020.ab.partial").mkdir()
    assert cli.main(["checkpoint", "rm", str(run_dir)]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["step_00000005", "step_00000010"]
    assert cli.main(["checkpoint", "rm", str(root / "step_00000005")]) == 0
    assert [path.name for path in root.iterdir()] == ["step_00000010"]
    assert not (run_dir / "run.lock").exists()


def test_rm_while_the_run_is_training(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    training = Claim.take(run_dir)
    assert cli.main(["checkpoint", "rm", str(run_dir / "checkpoints" / "step_00000005")]) == 2
    assert "is running in it" in capsys.readouterr().err
    assert (run_dir / "checkpoints" / "step_00000005").is_dir()
    training.release()


def test_rm_of_a_link_removes_the_link(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A checkpoint that was moved to another disk, or is another run's."""
    other = tmp_path_factory.mktemp("other") / "checkpoints" / "step_00000005"
    link = run_dir / "checkpoints" / "step_00000005"
    other.parent.mkdir()
    link.rename(other)
    link.symlink_to(other)
    assert cli.main(["checkpoint", "verify", str(link)]) == 0
    assert cli.main(["checkpoint", "rm", str(link)]) == 0
    assert not link.is_symlink()
    assert cli.main(["checkpoint", "verify", str(other)]) == 0


def test_what_was_set_aside(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Damaged checkpoints go with the leftovers; one that a roll-back left is whole, and goes when it is named."""
    root = run_dir / "checkpoints"
    _write(root / "damaged_step_00000002", 2)
    _write(root / "abandoned_step_00000003", 3)
    assert cli.main(["checkpoint", "rm", str(run_dir), "--json"]) == 0
    removed = [Path(path).name for path in json.loads(capsys.readouterr().out)["removed"]]
    assert removed == ["damaged_step_00000002", "step_00000015"]
    assert cli.main(["checkpoint", "verify", str(root / "abandoned_step_00000003")]) == 0
    assert cli.main(["checkpoint", "rm", str(root / "abandoned_step_00000003")]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["step_00000005", "step_00000010"]


def test_things_that_are_no_checkpoints(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = run_dir / "checkpoints"
    (root / "step_00000020").write_text("a file")
    (root / "step_00000021").symlink_to(root / "nowhere")
    (root / "step_00000015" / "link").symlink_to(root / "nowhere")
    (root / ".step_00000022.partial").write_text("a file")
    assert cli.main(["checkpoint", "ls", str(run_dir)]) == 0
    assert cli.main(["checkpoint", "verify", str(run_dir), "--json"]) == 1
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["checkpoints"]
    assert [row["damage"] is None for row in rows] == [False, False, False, True, True]
    assert cli.main(["checkpoint", "rm", str(run_dir)]) == 0
    assert sorted(path.name for path in root.iterdir()) == ["step_00000005", "step_00000010"]


def test_a_damaged_index_is_not_read(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = run_dir / "checkpoints" / "step_00000010"
    _flip(place / ".metadata")
    assert cli.main(["checkpoint", "show", str(place)]) == 2
    assert ".metadata is damaged (its checksum differs)" in capsys.readouterr().err


def test_a_checkpoint_outside_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Imported and merged ones have any name; they are removed as any directory."""
    _write(tmp_path / "imported", 5)
    for action in ("ls", "show", "verify"):
        assert cli.main(["checkpoint", action, str(tmp_path / "imported")]) == 0
    assert cli.main(["checkpoint", "rm", str(tmp_path / "imported")]) == 2
    assert (tmp_path / "imported").is_dir()


def test_rm_that_fails_says_why(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / ".step_00000010.deleted").mkdir()
    (run_dir / "checkpoints" / ".step_00000010.deleted" / "file").touch()
    assert cli.main(["checkpoint", "rm", str(run_dir / "checkpoints" / "step_00000010")]) == 2
    assert "cannot be removed: Directory not empty" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "takes one of ls, show, verify, rm"),
        (["verfy", "x"], "nemotron3 checkpoint verify RUN_DIR"),
        (["zzzz", "x"], "nemotron3 checkpoint ls RUN_DIR"),
        (["ls"], "nemotron3 checkpoint ls RUN_DIR"),
        (["ls", "nowhere"], "no run directory with checkpoints"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["checkpoint", *arguments]) == 2
    assert message in capsys.readouterr().err


def _write(path: Path, step: int, live: torch.Tensor | None = None) -> None:
    weight = torch.full((4, 3), float(step), dtype=torch.bfloat16)
    path.mkdir(parents=True)
    content = {"weight": weight, "optimizer.state.exp_avg.weight": torch.zeros(4, 3)}
    save(content, storage_writer=FileSystemWriter(path), no_dist=True)
    document = Manifest(
        step=step,
        optimizer_step=step,
        layout={"world_size": 4, "tp": 2, "cp": 1, "pp": 1, "ep": 2, "etp": 1, "vpp": 1},
        files={file.name: manifest.record(file) for file in path.iterdir()},
        state={"step": step, "tokens": 100 * step, "validation_loss": 2.5},
        samples=(Sample("weight", (0, 0), fingerprint(weight if live is None else live)),),
    )
    manifest.write(document, path)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
