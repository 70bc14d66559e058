"""The code of a run, copied into its directory: what is trained does not change when the checkout does."""

from __future__ import annotations

import json
import os
import platform
import shutil
import socket
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.launch.submission import write_file

CHECKOUT = Path(__file__).resolve().parents[2]
_CODE = ("nemotron3_megatron", "recipes", "slurm", "data_prep", "train.py")
"""Where new files count before they are added to git, and what is copied outside of git."""


def copy_code(target: Path, checkout: Path = CHECKOUT) -> None:
    """Copy the checkout as it stands: git's files with uncommitted changes, and new ones among the code.

    Links are copied as links; what git ignores, and ``.git``, stay behind.

    Raises:
        UserError: it cannot be written.
    """
    try:
        for name in _files(checkout):
            source, copy = checkout / name, target / name
            if source.is_symlink() or source.is_file():  # not: tracked, but deleted
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, copy, follow_symlinks=False)
    except OSError as error:
        raise UserError(str(target), why=f"the code cannot be copied: {error.strerror}") from None


def write_environment(path: Path, checkout: Path = CHECKOUT) -> None:
    """Record interpreter, packages with versions and commit. No variables: they may hold secrets."""
    commit = _git(checkout, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    packages = {str(found.metadata["Name"]): found.version for found in distributions()}
    record = {
        "python": sys.version.split()[0],
        "executable": sys.executable,
        "host": socket.gethostname(),
        "system": platform.platform(),
        "git_commit": commit[0] if commit else None,
        "packages": dict(sorted(packages.items(), key=lambda item: item[0].lower())),
    }
    write_file(path, json.dumps(record, indent=2) + "\n")


def _files(checkout: Path) -> list[str]:
    tracked = _git(checkout, "ls-files", "-z", separator="\0")
    if tracked is not None:
        new = _git(checkout, "ls-files", "-z", "--others", "--exclude-standard", "--", *_CODE, separator="\0")
        return [*tracked, *(new or [])]
    found = [checkout / name for name in _CODE if (checkout / name).exists()]
    inside = [path for place in found for path in ([place] if place.is_file() else place.rglob("*")) if path.is_file()]
    return [str(path.relative_to(checkout)) for path in inside if "__pycache__" not in path.parts]


def _git(checkout: Path, *arguments: str, separator: str = "\n") -> list[str] | None:
    """Output of git, split; None where the directory is no checkout's root."""
    if not (checkout / ".git").exists():
        return None
    command = ["git", "-C", os.fspath(checkout), *arguments]
    done = subprocess.run(command, capture_output=True, check=False)
    return os.fsdecode(done.stdout).strip(separator).split(separator) if done.returncode == 0 else None
