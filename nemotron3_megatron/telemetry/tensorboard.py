"""TensorBoard event files in ``run_dir/tensorboard``."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.scalars import eval_scalars, step_scalars


class TensorBoard:
    """Scalars by optimizer step; events past the resumed step are hidden, as TensorBoard's ``purge_step`` does.

    Args:
        run_dir: directory of the run.
        resumed_step: optimizer steps in the checkpoint this start continues; None: from the beginning.
    """

    def __init__(self, run_dir: Path, resumed_step: int | None) -> None:
        self._writer = SummaryWriter(log_dir=str(run_dir / "tensorboard"), purge_step=(resumed_step or 0) + 1)

    def write(self, record: StepRecord) -> None:
        """Add a step's scalars."""
        self._add(step_scalars(record), record.step)

    def write_eval(self, record: EvalRecord) -> None:
        """Add a validation pass's scalars."""
        self._add(eval_scalars(record), record.step)

    def sync(self) -> None:
        """Hand all events to the file."""
        self._writer.flush()

    def close(self) -> None:
        """Flush and close the event file."""
        self._writer.close()

    def _add(self, scalars: dict[str, float], step: int) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, step)
