"""Pictures of the plan, drawn where the run will be."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from nemotron3_megatron.config.run import Run


def write_picture(what: str, path: Path, draw: Callable[[Path, Run], None], run: Run) -> str:
    """Draw into ``path``; returns where the picture is, or why it is not.

    The plan of a run elsewhere (a cluster's run_dir) is a plan all the same, so this raises nothing.
    """
    try:
        draw(path, run)
    except OSError as error:
        return f"no {what}: {path} cannot be written ({error.strerror})"
    return f"{what}: {path}"
