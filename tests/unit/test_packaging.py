"""The lock files belong to pyproject.toml and are complete; set-up finds a Python or says what to install."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LOCKS = {
    "requirements.lock": ("data", "track", "dev"),
    "requirements-cuda.lock": ("cuda",),
}


def pins(lock: str) -> dict[str, tuple[str, int]]:
    """Name -> (version, number of hashes) of every requirement in a lock file."""
    found = {}
    for block in re.split(r"\n(?=\S)", (ROOT / lock).read_text().strip()):
        first, *rest = block.splitlines()
        pin = re.fullmatch(r"([\w.-]+)(?:\[[\w,.-]+\])?==(\S+) \\", first)
        assert pin, first
        assert all(re.fullmatch(r"    --hash=sha256:[0-9a-f]{64}( \\)?", line) for line in rest), block
        found[canonicalize_name(pin[1])] = (pin[2], len(rest))
    return found


@pytest.mark.parametrize("lock", [*LOCKS, "requirements-uv.lock"])
def test_every_requirement_is_pinned_with_hashes_and_nothing_else_is_said(lock: str) -> None:
    assert all(hashes > 0 for _, hashes in pins(lock).values())


@pytest.mark.parametrize(("lock", "extras"), LOCKS.items())
def test_the_lock_satisfies_pyproject(lock: str, extras: tuple[str, ...]) -> None:
    wanted = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    locked = pins(lock)
    for requirement in map(Requirement, wanted):
        version, _ = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_both_locks_agree_where_they_overlap() -> None:
    ours, cuda = pins("requirements.lock"), pins("requirements-cuda.lock")
    assert {name: ours[name] for name in ours.keys() & cuda.keys()} == {
        name: cuda[name] for name in ours.keys() & cuda.keys()
    }


def find_python(folder: Path, *candidates: str) -> subprocess.CompletedProcess[str]:
    # Only the shell's own tools and what the test put into the folder: no pyenv, no other Python.
    for tool in ("bash", "env"):
        path = shutil.which(tool)
        assert path is not None
        (folder / tool).symlink_to(path)
    return subprocess.run(
        [ROOT / "scripts" / "find_python", *candidates],
        env={"PATH": str(folder), "HOME": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


def fake_python(file: Path, version: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    # Refuses the test of its version, then tells it.
    file.write_text(f'#!/usr/bin/env bash\n[[ "$2" == *platform* ]] && echo {version} || exit 1\n')
    file.chmod(0o755)


def real_python(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f'#!/usr/bin/env bash\nexec {sys.executable} "$@"\n')
    file.chmod(0o755)


def test_an_old_python_in_path_does_not_hide_a_newer_one_of_pyenv(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", "3.11.7")
    real_python(tmp_path / ".pyenv" / "versions" / "3.12.1" / "bin" / "python3")
    found = find_python(tmp_path)
    assert found.returncode == 0, found.stderr
    assert Path(found.stdout.strip()) == Path(sys.executable)


def test_the_named_python_comes_first(tmp_path: Path) -> None:
    real_python(tmp_path / "mine")
    fake_python(tmp_path / "python3.12", "3.12.0")
    assert find_python(tmp_path, str(tmp_path / "mine")).stdout.strip() == sys.executable


def test_without_a_python_the_message_says_what_was_found_and_what_to_install(tmp_path: Path) -> None:
    fake_python(tmp_path / "python3", "3.11.7")
    found = find_python(tmp_path)
    assert found.returncode == 1
    assert found.stdout == ""
    assert f"{tmp_path}{os.sep}python3 is 3.11.7" in found.stderr
    assert "apt-get install python3.12 python3.12-venv" in found.stderr
    assert "make env PYTHON=/path/to/python3.12" in found.stderr


def test_make_lists_its_targets() -> None:
    done = subprocess.run(["make", "--no-print-directory", "-C", ROOT], capture_output=True, text=True, check=True)
    for target in ("env", "quickstart", "test", "lint", "lock", "clean", "help"):
        assert re.search(rf"^  make {target} ", done.stdout, re.MULTILINE), target
