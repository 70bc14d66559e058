"""The beginning of a run from an imported model."""

from __future__ import annotations

from pathlib import Path

from megatron.core.optimizer.optimizer import MegatronOptimizer
from megatron.core.transformer.module import MegatronModule

from nemotron3_megatron.checkpoint.store import CheckpointStore, load_state


def is_imported(path: Path) -> bool:
    """Whether no run has trained a checkpoint: it holds weights, and no position in any data.

    Raises:
        UserError: it is not complete.
    """
    return "data" not in load_state(path)


def start_from_weights(
    store: CheckpointStore, path: Path, chunks: list[MegatronModule], optimizer: MegatronOptimizer
) -> None:
    """Weights of ``path`` under any layout, master weights the same, moments as they are in a new run. A collective.

    Raises:
        UserError: the checkpoint is damaged or of another model.
    """
    store.load(path, chunks, None)
    optimizer.reload_model_params()
