"""Where records go. Rank 0 builds the writers of a run once and hands every record to each of them."""

from __future__ import annotations

import logging
import os
from importlib.util import find_spec
from typing import Protocol

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.telemetry.console import Console
from nemotron3_megatron.telemetry.jsonlines import JsonLines
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord

log = logging.getLogger(__name__)


class Writer(Protocol):
    """A destination of records. Writers see every step; each decides what it shows."""

    def write(self, record: StepRecord) -> None:
        """Take one optimizer step."""

    def write_eval(self, record: EvalRecord) -> None:
        """Take one validation pass."""

    def sync(self) -> None:
        """Make what was written durable; called before a checkpoint becomes visible."""

    def close(self) -> None:
        """End of this start; nothing is written afterwards."""


def build_writers(run: Run, resumed_step: int | None) -> list[Writer]:
    """The writers ``run.telemetry`` asks for; call on rank 0 only.

    ``metrics.jsonl`` comes first: it is the source of truth, and must have a record before anything else shows it.

    Args:
        run: the run.
        resumed_step: optimizer steps in the checkpoint this start continues; None: from the beginning.
    """
    console = Console(run)
    if resumed_step is not None:
        console.resumed(resumed_step)
    writers: list[Writer] = [JsonLines(run.run_dir, resumed_step), console]
    if run.telemetry.tensorboard:
        writers += _tensorboard(run, resumed_step)
    if run.telemetry.wandb != "disabled":
        writers += _wandb(run)
    return writers


def _tensorboard(run: Run, resumed_step: int | None) -> list[Writer]:
    if not _installed("tensorboard"):
        log.warning("no TensorBoard files: the package is missing (pip install tensorboard)")
        return []
    from nemotron3_megatron.telemetry.tensorboard import TensorBoard

    return [TensorBoard(run.run_dir, resumed_step)]


def _wandb(run: Run) -> list[Writer]:
    if not _installed("wandb"):
        log.warning("no W&B: the package is missing (pip install wandb), or set telemetry.wandb=disabled")
        return []
    from nemotron3_megatron.telemetry.weights_and_biases import WandB, netrc_path, resolve_mode

    mode = resolve_mode(run.telemetry.wandb, os.environ, netrc_path())
    return [] if mode == "disabled" else [WandB(run, mode)]


def _installed(package: str) -> bool:
    """Whether ``package`` can be imported; a mere folder of that name (W&B leaves ``./wandb``) is not it."""
    spec = find_spec(package)
    return spec is not None and spec.origin is not None
