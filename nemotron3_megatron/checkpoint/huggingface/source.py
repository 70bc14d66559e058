"""The run that a checkpoint belongs to."""

from __future__ import annotations

from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.telemetry.run_record import FILE_NAME, read_run_record


def run_of(checkpoint: Path) -> Run:
    """The run whose ``run.json`` lies in the checkpoint (an imported one) or in its run directory.

    Raises:
        UserError: ``checkpoint`` is no checkpoint directory, or no run is described.
    """
    inside = sorted([*checkpoint.glob("checkpoints/step_*"), *checkpoint.glob("step_*")])
    if inside:
        raise UserError(f"checkpoint={checkpoint}", why="holds checkpoints", nearest=f"checkpoint={inside[-1]}")
    if not checkpoint.is_dir():
        nearest = "checkpoint=RUN_DIR/checkpoints/step_XXXXXXXX"
        raise UserError(f"checkpoint={checkpoint}", why="there is no such directory", nearest=nearest)
    return read_run_record(run_dir_of(checkpoint) or checkpoint).run


def run_dir_of(checkpoint: Path) -> Path | None:
    """The run directory that a checkpoint lies in; None: it was imported, and describes itself."""
    return None if (checkpoint / FILE_NAME).is_file() else checkpoint.resolve().parent.parent
