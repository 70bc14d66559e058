from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron3_megatron.config import compose
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.sweep import run_sweep, sweep_jobs


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Overrides that point the quickstart sources to files that exist."""
    for name in ("text.bin", "text.idx"):
        (tmp_path / name).touch()
    prefix = tmp_path / "text"
    return [f"data.sources.train.path={prefix}", f"data.validation.validation.path={prefix}"]


def test_every_combination_has_its_own_directory(data: list[str]) -> None:
    jobs = sweep_jobs(["recipe=tiny", "seed=1,2", "optimizer.lr=0.001,0.002", "run_dir=out", *data])
    recipes = [compose(job.overrides)[0] for job in jobs]
    assert [(recipe.seed, recipe.optimizer.lr) for recipe in recipes] == [
        (1, 0.001),
        (1, 0.002),
        (2, 0.001),
        (2, 0.002),
    ]
    assert recipes[1].run_dir == "out/seed=1,optimizer.lr=0.002"
    assert len({recipe.run_dir for recipe in recipes}) == 4
    assert {job.world_size for job in jobs} == {2}


def test_a_bad_combination_stops_the_sweep_before_it_starts(data: list[str]) -> None:
    with pytest.raises(UserError, match=r"parallel\.ep=3"):
        sweep_jobs(["recipe=tiny", "parallel.ep=1,3", *data])


def test_groups_can_be_swept(data: list[str]) -> None:
    jobs = sweep_jobs(["recipe=tiny", "precision=bf16,fp32", *data])
    assert [compose(job.overrides)[0].precision.name for job in jobs] == ["bf16", "fp32"]


def test_jobs_run_one_after_the_other_and_the_first_failure_is_kept(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real torchrun, with one process, of a script that only notes its command line."""
    monkeypatch.delenv("RANK", raising=False)
    script = tmp_path / "note.py"
    script.write_text(
        "import sys, pathlib\n"
        f"open({str(tmp_path / 'notes')!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')\n"
        "sys.exit(3 if 'seed=1' in sys.argv else 0)\n"
    )
    overrides = ["recipe=tiny", "seed=1,2", "parallel.ep=1", "world_size=1", *data]
    assert run_sweep(overrides, str(script)) != 0
    notes = (tmp_path / "notes").read_text().splitlines()
    assert ["seed=1" in notes[0], "seed=2" in notes[1]] == [True, True]


def test_under_torchrun_a_sweep_is_refused() -> None:
    train = Path(__file__).parents[3] / "train.py"
    environment = {**os.environ, "RANK": "0"}
    done = subprocess.run(
        [sys.executable, str(train), "-m", "recipe=tiny", "seed=1,2"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "under torchrun" in done.stderr
    assert "Traceback" not in done.stderr
