"""A sweep: one command line with several values of a key, as one command line for each combination."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from nemotron3_megatron.config.compose import RECIPES, compose
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.parts import planned_world
from nemotron3_megatron.config.resolve import check_data, resolve


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a sweep, checked and ready to be launched."""

    overrides: tuple[str, ...]
    world_size: int


def sweep_jobs(overrides: Sequence[str], recipes: Path = RECIPES) -> tuple[Job, ...]:
    """Expand ``a=1,2 b=x,y`` to its combinations, each with a run directory of its own.

    The directory is ``<run_dir>/<a=1,b=x>``, a function of the swept values only: the same command resumes each of
    its runs.

    Raises:
        UserError: a combination that cannot run; nothing has been started then.
    """
    from nemotron3_megatron.config.tree import expand_sweep

    combinations = expand_sweep(overrides)
    swept = [index for index, values in enumerate(zip(*combinations, strict=True)) if len(set(values)) > 1]
    jobs = []
    for combination in combinations:
        recipe, origins = compose(combination, recipes)
        run = resolve(recipe, planned_world(recipe), origins)
        check_data(run)
        label = re.sub(r"[^\w.=,+-]+", "_", ",".join(combination[index] for index in swept))
        others = [override for override in combination if not override.startswith("run_dir=")]
        run_dir = run.run_dir / label if label else run.run_dir
        jobs.append(Job((*others, f'run_dir="{run_dir}"'), run.layout.world_size))
    return tuple(jobs)


def run_sweep(overrides: Sequence[str], script: str) -> int:
    """Launch every combination through torchrun on this machine, one after the other.

    Returns:
        0, or the exit status of the first run that failed. A failed run does not keep the others from running.

    Raises:
        UserError: a combination that cannot run, or the sweep itself was started by torchrun.
    """
    if "RANK" in os.environ:
        raise UserError(
            "-m",
            where="command line",
            why="a sweep launches its own processes and cannot run under torchrun",
            nearest=f"python {script} -m {' '.join(overrides)}",
        )
    status = 0
    jobs = sweep_jobs(overrides)
    for number, job in enumerate(jobs, start=1):
        sys.stderr.write(f"sweep {number}/{len(jobs)}: {' '.join(job.overrides)}\n")
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.world_size}"]
        code = subprocess.run([*launcher, script, *job.overrides], check=False).returncode
        status = status or code
    return status
