"""What was submitted: ``RUN/launch.json``, from which every segment's job is made."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from nemotron3_megatron.config.cluster import ClusterConfig
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import plain
from nemotron3_megatron.config.typed import typed

FILE_NAME = "launch.json"
_UNSAFE = '":,\\'
"""In no path of ours: they end a quote of sbatch's, or separate mounts and entries of PYTHONPATH."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """What a stage is trained on."""

    stage: str
    end_step: int
    """The first step after it."""
    nodes: int
    processes_per_node: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """All that later segments need to know."""

    name: str
    run_dir: Path
    working_dir: Path
    """Relative paths of the recipe (data, tokenizer) start here."""
    code: Path
    """Checkout that trains."""
    python: str
    arguments: tuple[str, ...]
    """Of train.py."""
    worlds: tuple[World, ...]
    """In the order of the stages."""
    total_steps: int
    cluster: ClusterConfig

    def world_at(self, step: int) -> World:
        """What to train on when ``step`` steps are done; the last one at the end."""
        return next((world for world in self.worlds if step < world.end_step), self.worlds[-1])


def worlds(run: Run, cluster: ClusterConfig) -> tuple[World, ...]:
    """Nodes of every stage.

    Raises:
        UserError: a world that does not fill its nodes.
    """
    found = []
    for stage in run.stages:
        size, per_node = (stage.layout or run.layout).world_size, cluster.processes_per_node
        if size > per_node and size % per_node:
            raise UserError(
                f"{size} ranks in stage {stage.name}",
                why=f"do not fill nodes of {per_node} processes (cluster.processes_per_node)",
                nearest=f"a world size of {-(-size // per_node) * per_node}",
            )
        nodes, processes = max(size // per_node, 1), min(size, per_node)
        found.append(World(stage=stage.name, end_step=stage.end_step, nodes=nodes, processes_per_node=processes))
    return tuple(found)


def write_submission(submission: Submission) -> None:
    """Write ``launch.json``."""
    write_file(submission.run_dir / FILE_NAME, json.dumps(plain(submission), indent=2) + "\n")


def read_submission(run_dir: Path) -> Submission:
    """Read ``launch.json``.

    Raises:
        UserError: the directory holds none, or one of another version.
    """
    path = run_dir / FILE_NAME
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        why = f"it holds no {FILE_NAME}, so no run was submitted in it"
        raise UserError(str(run_dir), why=why, nearest="the run_dir of nemotron3 submit") from None
    except (OSError, ValueError) as error:
        raise UserError(str(path), why=f"cannot be read: {error}") from None
    submission = typed(Submission, data, "", lambda key: str(path))
    assert isinstance(submission, Submission)
    return submission


def write_file(path: Path, text: str) -> None:
    """Write a file in one step, writable by its owner and readable by the group only."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o640)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
    partial.replace(path)


def check_path(path: Path, key: str) -> None:
    """Refuse paths that sbatch, a container's mounts or PYTHONPATH cannot carry; a shell could.

    Raises:
        UserError: control characters, or one of ``" : , \\``, or ``${``.
    """
    text = str(path)
    if not text.isprintable() or any(mark in text for mark in _UNSAFE) or "${" in text:
        why = f"holds a control character, one of {' '.join(_UNSAFE)}, or ${{"
        raise UserError(f"{key}={text!r}", why=why, nearest="a path without them; spaces and quotes are fine")
