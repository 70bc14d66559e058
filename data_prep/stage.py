"""A stage of a preparation: a datatrove pipeline that runs once for each of its tasks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from datatrove.pipeline.base import PipelineStep


@dataclass(frozen=True, slots=True)
class Stage:
    """Runs after all tasks of the stage before it."""

    name: str
    steps: tuple[PipelineStep, ...]
    num_tasks: int
    logs: Path
    """datatrove's logging directory: logs, statistics, marks of completion."""
    reads: bool = False
    """Each task is a shard that reads its input files, so that progress is measured in bytes."""

    @property
    def completed(self) -> set[int]:
        """Tasks that are marked as complete."""
        return {int(path.name) for path in (self.logs / "completions").glob("*")}


def progress_directory(logs: Path) -> Path:
    """Where the tasks of a stage write how far they are."""
    return logs / "progress"
