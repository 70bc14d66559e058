"""Decisions of the quickstart; the whole of it is run by hand and by ``make quickstart``."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest

from nemotron3_megatron import quickstart
from nemotron3_megatron.quickstart import CLEAR_MARGIN_NATS, free_run_dir, has_learned, main, newest_step


def checkpoint(run_dir: Path, step: int) -> None:
    (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.mark.parametrize(
    ("loss", "entropy", "learned"),
    [
        (4.0, 6.5, True),
        (6.5 - CLEAR_MARGIN_NATS - 0.01, 6.5, True),
        (6.5 - CLEAR_MARGIN_NATS + 0.01, 6.5, False),
        (7.0, 6.5, False),
        (math.nan, 6.5, False),
        (None, 6.5, False),
        (4.0, None, False),
    ],
)
def test_the_verdict_needs_a_clear_margin(loss: float | None, entropy: float | None, learned: bool) -> None:
    assert has_learned(loss, entropy) is learned


def test_the_newest_checkpoint_is_found(tmp_path: Path) -> None:
    assert newest_step(tmp_path) == 0
    for step in (100, 98, 1000):
        checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / ".step_00002000.partial").mkdir()
    (tmp_path / "checkpoints" / "step_of_mine").mkdir()
    assert newest_step(tmp_path) == 1000


def test_a_finished_run_is_left_alone_and_an_unfinished_one_continued(tmp_path: Path) -> None:
    first = tmp_path / "quickstart"
    assert free_run_dir(first, 100) == first
    checkpoint(first, 40)
    assert free_run_dir(first, 100) == first
    checkpoint(first, 100)
    assert free_run_dir(first, 100) == tmp_path / "quickstart_2"
    checkpoint(tmp_path / "quickstart_2", 100)
    assert free_run_dir(first, 100) == tmp_path / "quickstart_3"


def test_wrong_arguments_end_with_status_2(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipe=tiny"]) == 2
    assert "knows only run_dir" in capsys.readouterr().out
    checkpoint(tmp_path, 10**7)
    assert main([f"run_dir={tmp_path}"]) == 2
    assert "holds a finished run" in capsys.readouterr().out


def test_the_first_failing_command_ends_it_and_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(quickstart.subprocess, "run", fail)
    assert main([f"run_dir={tmp_path}"]) == 3
    assert len(commands) == 1
    assert "failed with status 3" in capsys.readouterr().out
