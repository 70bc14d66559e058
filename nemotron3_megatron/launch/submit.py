"""``nemotron3 submit``: a run directory that holds all it needs, and its first job."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemotron3_megatron.config import check_data, compose, is_uniform, resolve
from nemotron3_megatron.config.cluster import SECRET_NAME, check_cluster
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import to_json
from nemotron3_megatron.launch import slurm
from nemotron3_megatron.launch.job import FILE_NAME, LOGS, render
from nemotron3_megatron.launch.snapshot import copy_code, write_environment
from nemotron3_megatron.launch.submission import FILE_NAME as SUBMISSION
from nemotron3_megatron.launch.submission import Submission, check_path, worlds, write_file, write_submission

CODE = "code"
_SHORTEST_SECRET = 6
"""As in exit_record: shorter values occur in ordinary text."""


def submit_main(overrides: list[str]) -> int:
    """Write the run directory and submit its job."""
    run, submission = prepare(overrides)
    check_data(run)
    script = _script(submission)
    if not slurm.is_here():
        raise UserError("sbatch", why="is not installed here", nearest="a login node, or --dry-run")
    slurm.validate(script)
    write_run_directory(run, submission, script)
    number = slurm.submit(submission.run_dir / FILE_NAME)
    sys.stdout.write(f"job {number}, run directory {submission.run_dir}\n")
    return 0


def dry_run(overrides: list[str]) -> int:
    """Print the script and what Slurm thinks of it; writes nothing."""
    run, submission = prepare(overrides)
    script = _script(submission)
    sys.stdout.write(script)
    sys.stdout.flush()
    said = slurm.validate(script) if slurm.is_here() else "not validated: sbatch is not installed here"
    sys.stderr.write(f"{said}\n")
    try:
        check_data(run)
    except UserError as error:
        sys.stderr.write(f"would be refused: {error}\n")
    return 0


def prepare(overrides: Sequence[str]) -> tuple[Run, Submission]:
    """Resolve the recipe and all that the job will need; touches no file."""
    recipe, origins = compose(overrides)
    places = {origin.key: origin.place for origin in origins}
    check_cluster(recipe.cluster, places.get)
    named = [text for text in overrides if text.split("=", 1)[0] in ("run_dir", "world_size")]
    run = resolve(replace(recipe, stage=None), _world_size(recipe, named), origins)
    run_dir, working_dir = run.run_dir.absolute(), Path.cwd()
    check_path(run_dir, "run_dir")
    check_path(working_dir, "the working directory")
    _check_secrets_file(recipe.cluster.secrets_file)
    if (run_dir / SUBMISSION).exists():
        again = f"sbatch {run_dir}/{FILE_NAME} to continue it, or another run_dir"
        raise UserError(f"run_dir={run_dir}", why="a run was submitted there already", nearest=again)
    container = recipe.cluster.container
    code = container.code if container else None
    submission = Submission(
        name=run.name,
        run_dir=run_dir,
        working_dir=working_dir,
        code=Path(code) if code else run_dir / CODE,
        python=recipe.cluster.python or ("python" if container else sys.executable),
        arguments=(*(text for text in overrides if text not in named), f'run_dir="{run_dir}"'),
        worlds=worlds(run, recipe.cluster),
        total_steps=run.total_steps,
        cluster=recipe.cluster,
    )
    return run, submission


def write_run_directory(run: Run, submission: Submission, script: str) -> None:
    """All that a restart needs; the script last, so that its presence means a whole directory."""
    from nemotron3_megatron.plan.html import write_page  # draws with matplotlib

    run_dir = submission.run_dir
    try:
        run_dir.mkdir(mode=0o750, parents=True, exist_ok=True)
        (run_dir / LOGS).mkdir(mode=0o750, exist_ok=True)
    except OSError as error:
        raise UserError(f"run_dir={run_dir}", why=f"cannot be made: {error.strerror}") from None
    if submission.code == run_dir / CODE:
        copy_code(submission.code)
    write_file(run_dir / "recipe.json", to_json(run) + "\n")
    write_environment(run_dir / "environment.json")
    write_page(run_dir / "plan.html", run)
    write_submission(submission)
    write_file(run_dir / FILE_NAME, script)


def _script(submission: Submission) -> str:
    script = render(submission, submission.worlds[0])
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET and value in script:
            why = "its value stands in an argument, and would be written into the job's script"
            raise UserError(name, why=why, nearest="cluster.secrets_file=FILE, readable by you only")
    return script


def _world_size(recipe: Recipe, named: Sequence[str]) -> int:
    """Ranks of the first stage. train.py learns the world from torchrun, so its command line cannot carry one."""
    if not is_uniform(recipe) and any(text.startswith("world_size=") for text in named):
        why = "stages of this recipe differ in layout, and one number cannot be right for all"
        raise UserError("world_size", where="command line", why=why, nearest="stages.NAME.world_size=N")
    size = next(iter(recipe.stages.values())).world_size if recipe.stages else None
    if (size := size or recipe.world_size) is None:
        raise UserError("world_size", why="is not set by the recipe", nearest="world_size=N")
    return size


def _check_secrets_file(name: str | None) -> None:
    if name is None:
        return
    path = Path(name)
    if not path.is_file():
        raise UserError(f"cluster.secrets_file={name}", why="does not exist", nearest="a file of NAME=value lines")
    if not path.is_absolute():
        why = "is relative, and the job starts elsewhere"
        raise UserError(f"cluster.secrets_file={name}", why=why, nearest=str(path.absolute()))
    if stat.S_IMODE(path.stat().st_mode) & 0o077:
        why = "can be read by others than its owner"
        raise UserError(f"cluster.secrets_file={name}", why=why, nearest=f"chmod 600 {name}")
