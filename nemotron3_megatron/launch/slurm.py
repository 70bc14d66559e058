"""Slurm's commands, called without a shell."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron3_megatron.config.errors import UserError


@dataclass(frozen=True, slots=True)
class Job:
    """A job in the queue."""

    number: str
    state: str
    """RUNNING, PENDING, COMPLETING, ..."""
    reason: str
    """Why it waits; ``None`` where it does not."""


def is_here() -> bool:
    """Whether this machine can submit."""
    return shutil.which("sbatch") is not None


def validate(script: str) -> str:
    """Have Slurm check a batch script without running it.

    Returns:
        What it says: when and where the job would start.

    Raises:
        UserError: Slurm refuses it.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".sbatch", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        done = _call(["sbatch", "--test-only", file.name])
    if done.returncode != 0:
        raise UserError("Slurm refuses the job", why=done.stderr.strip().removeprefix("sbatch: "))
    return done.stderr.strip()


def submit(script: Path) -> str:
    """Submit a batch script; returns the job's number.

    Raises:
        UserError: Slurm refuses it.
    """
    done = _call(["sbatch", "--parsable", str(script)])
    if done.returncode != 0:
        raise UserError(f"sbatch {script}", why=done.stderr.strip(), nearest=f"mend it and call sbatch {script}")
    return done.stdout.strip().partition(";")[0]


def jobs(name: str) -> tuple[Job, ...]:
    """This user's jobs of that name; none where Slurm is not installed or does not answer."""
    if not is_here():
        return ()
    done = _call(["squeue", "--noheader", "--me", f"--name={name}", "--format=%i %T %r"])
    rows = [line.split(maxsplit=2) for line in done.stdout.splitlines() if done.returncode == 0]
    return tuple(Job(*row) for row in rows if len(row) == 3)


def cancel(numbers: Sequence[str]) -> None:
    """Take waiting jobs out of the queue; those that run are left alone."""
    if numbers:
        _call(["scancel", "--state=PENDING", *numbers])


def warn(number: str) -> None:
    """Tell a running job's batch script to save and leave, as Slurm does before the time limit."""
    _call(["scancel", "--batch", "--signal=USR1", number])


def _call(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
