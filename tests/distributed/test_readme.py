"""The commands of the README's first hour, run as they stand there, in order, in an empty directory."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.plan.memory import memory_plan

REPOSITORY = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent


def commands_of(heading: str) -> list[str]:
    """The indented commands of a section."""
    section = (REPOSITORY / "README.md").read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = re.sub(r"\\\n\s*", "", section).splitlines()
    return [line.strip() for line in lines if line.startswith("    ")]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_first_hour(tmp_path: Path) -> None:
    (tmp_path / "train.py").symlink_to(REPOSITORY / "train.py")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
    commands = commands_of("First hour")
    assert len(commands) >= 9
    for command in commands:
        words = shlex.split(command, comments=True)
        words[0] = str(BIN / words[0].removeprefix(".venv/bin/"))
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        wrong_on_purpose = "parallel.ep=3" in command
        assert done.returncode == (2 if wrong_on_purpose else 0), f"{command}\n{done.stdout}\n{done.stderr}"
        assert "Traceback" not in done.stdout + done.stderr, f"{command}\n{done.stderr}"


def test_commands_for_one_gpu_resolve() -> None:
    """They run in tests/gpu by hand only; here their recipes become runs of one rank that a GPU of 80 GB holds."""
    starts = [command for command in commands_of("One GPU") if "train.py" in command]
    assert len(starts) == 3
    for command in starts:
        recipe, origins = compose(shlex.split(command)[3:])
        run = resolve(recipe, 1, origins)
        assert memory_plan(run).fullest.total < 75 * 2**30, command


def test_every_make_target_of_the_readme_exists() -> None:
    readme, makefile = ((REPOSITORY / name).read_text() for name in ("README.md", "Makefile"))
    for target in set(re.findall(r"\bmake ([a-z-]+)", readme)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"


def test_links_and_files_of_the_readme_exist() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", readme):
        assert (REPOSITORY / target).exists(), target
