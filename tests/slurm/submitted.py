"""Runs small enough to be started many times, submitted for real."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import Any

import psutil
from e2e_start import overrides, records
from lab import Lab

STEPS = 60
SMALL = (
    "precision=fp32",
    "max_steps=60",
    "stages.main.tokens=60 steps",
    "checkpoint.every=5 steps",
    "checkpoint.keep_last=null",
    "telemetry.eval_every=null",
    "cluster=local",
    "cluster.processes_per_node=1",
    "cluster.retry_wait=1 s",
)
SECRET = {name: token_hex(20) for name in ("WANDB_API_KEY", "HF_TOKEN")}
"""Made anew each time: a run directory also holds a copy of this file."""


def nemotron3(lab: Lab, *arguments: str | Path, environment: Mapping[str, str] | None = None) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command line tool on the login node."""
    command = [sys.executable, "-m", "nemotron3_megatron.cli", *map(str, arguments)]
    variables = {**lab.environment, **(environment or {})}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def arguments_of(run_dir: Path, data: Path, *more: str) -> list[str]:
    """The command line of a small run; ``more`` replaces what is set here."""
    return [
        text.replace(f"run_dir={run_dir}", f'run_dir="{run_dir}"') for text in overrides(run_dir, data, *SMALL, *more)
    ]


@dataclass(frozen=True, slots=True)
class Submitted:
    """A run on the cluster."""

    lab: Lab
    run_dir: Path
    first_job: str

    @classmethod
    def start(cls, lab: Lab, run_dir: Path, data: Path, *more: str) -> Submitted:
        code, out, err = nemotron3(lab, "submit", *arguments_of(run_dir, data, *more), environment=SECRET)
        assert code == 0, err
        return cls(lab, run_dir, out.split()[1].rstrip(","))

    def logs(self) -> str:
        """What all segments said."""
        return "\n".join(path.read_text() for path in sorted((self.run_dir / "logs").iterdir()))

    def events(self) -> list[dict[str, Any]]:
        return records(self.run_dir, "segments.jsonl")

    def when(self, condition: Callable[[], bool], what: str, timeout_s: float = 400) -> None:
        """Wait for something in the run directory."""
        try:
            self.lab.wait_until(condition, timeout_s, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.logs()[-5000:]}") from None

    def when_trained(self, job: str, steps: int) -> None:
        """Wait until a job has trained so many steps since it began; those of earlier segments do not count."""
        begun, metrics = self.begun(job), self.run_dir / "metrics.jsonl"

        def trained() -> bool:
            if not begun() or not metrics.exists() or metrics.stat().st_mtime < begun()[-1]["time"]:
                return False  # a start drops what lies beyond its checkpoint before it goes on
            return self.step() >= begun()[-1]["checkpoint"] + steps

        self.when(trained, f"{steps} steps in {job}")

    def begun(self, job: str) -> Callable[[], list[dict[str, Any]]]:
        return lambda: [
            event for event in self.events() if event["event"] == "begin" and event["segment"].startswith(f"{job}.")
        ]

    def step(self) -> int:
        found = records(self.run_dir)
        return found[-1]["step"] if found else 0

    def next_job(self, after: str) -> str:
        """Wait for the job that follows; its number."""
        self.when(lambda: bool(self._after(after)), f"a job after {after}")
        return self._after(after)[-1]

    def _after(self, number: str) -> list[str]:
        """Later jobs; Slurm forgets ended ones after a while, ``number`` too."""
        return [job for job in self.lab.jobs() if int(job) > int(number)]

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.process_iter():
            try:
                environment = process.environ()
                is_it = environment.get("RANK") == str(number) and str(self.run_dir) in environment.get(
                    "PYTHONPATH", ""
                )
                if is_it and "train.py" in " ".join(process.cmdline()):
                    return process
            except psutil.Error:
                continue
        raise AssertionError(f"rank {number} does not run")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def pick(found: Sequence[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    return [{key: record[key] for key in keys} for record in found]
