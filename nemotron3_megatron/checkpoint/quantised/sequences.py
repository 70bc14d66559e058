"""The training data that comes after a checkpoint, one sequence at a time: calibration and distillation read it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.data.training import TrainingData


@contextmanager
def sequences_after(
    run: Run, state: Mapping[str, Any], seq_length: int | None = None
) -> Iterator[Iterator[MicroBatch]]:
    """Sequences that the run's blend would have gone on with; an imported model's begin at its beginning.

    Args:
        run: on one rank.
        state: of the checkpoint.
        seq_length: None: that of the checkpoint's next step.

    Raises:
        UserError: the data cannot be read or is not the checkpoint's.
    """
    shape = run.shape_at(int(state["step"]))
    length = seq_length or shape.seq_length
    one = replace(
        shape,
        seq_length=length,
        tokens_per_step=length,
        global_batch_size=1,
        micro_batch_size=1,
        num_microbatches=1,
    )
    data = TrainingData(run, dp_rank=0, dp_size=1, cp_rank=0, cp_size=1)
    try:
        if "data" in state:
            data.load_state_dict(state["data"])
        yield (batch for _ in iter(int, 1) for batch in data.next_step(one))
    finally:
        data.close()


def logits_of(run: Run, device: torch.device) -> Callable[[nn.Module, MicroBatch], Tensor]:
    """``logits(model, batch)``: (B, S, V), documents isolated as in training."""

    def logits(model: nn.Module, batch: MicroBatch) -> Tensor:
        isolated = run.data.isolate_documents
        boundaries = batch.boundaries().to(device) if isolated else None
        there = batch.to(device)
        documents = there.documents if isolated else None
        found: Tensor = model(there.tokens, there.position_ids, documents=documents, boundaries=boundaries)
        return found

    return logits
