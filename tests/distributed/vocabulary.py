"""What ranks do in test_vocabulary_loss: training steps with output layer and loss apart, or in one as on a GPU."""

from __future__ import annotations

from typing import Any

import layouts
from torch import Tensor

from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.train.step import train_step


def steps(layout: dict[str, Any], one_pass: bool) -> list[list[float]]:
    """Losses of all depths and the gradient norm of three steps, in a process that ends with the test."""
    if one_pass:
        Nemotron3Model._token_losses = _in_one_pass  # type: ignore[method-assign]
    with layouts.started(layout) as trainer:
        results = [train_step(trainer, layouts.batches(trainer, i)[:1], trainer.run.stages[0], 1e-3) for i in range(3)]
    return [[*result.losses, result.update.grad_norm] for result in results]


def _in_one_pass(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    losses: Tensor = model.output_layer(hidden, labels=labels)
    return losses
