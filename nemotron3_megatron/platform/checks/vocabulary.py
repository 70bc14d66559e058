"""Output layer and cross entropy in one, Nano's vocabulary.

Shapes: S sequence, B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import math
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron3_megatron.platform.checks.kernel import BEFORE, Draw, KernelFamily

LOGITS = 3.0
"""Standard deviation of the logits: large enough for the softmax to be seen beside the label in the gradient."""


def _inputs(draw: Draw) -> dict[str, Any]:
    length, batch, hidden, vocabulary = draw.size(128, 24), 2, draw.size(1024, 32), draw.size(131072, 500)
    return {
        "hidden": draw.normal(length, batch, hidden, scale=LOGITS),
        "weight": draw.normal(vocabulary, hidden, scale=1 / math.sqrt(hidden)),
        "labels": draw.integers(batch, length, below=vocabulary),
    }


def _loss(hidden: Tensor, weight: nn.Parameter, labels: Tensor) -> Tensor:
    from nemotron3_megatron.model.vocabulary_loss import vocabulary_loss

    fused = hidden.is_cuda and importlib.util.find_spec("transformer_engine") is not None
    if fused:
        weight.main_grad = torch.full_like(weight, BEFORE, dtype=torch.float32)  # type: ignore[attr-defined]
    # What the loss reads of Megatron-Core's output layer, in a world of one.
    layer = SimpleNamespace(
        tp_group=SimpleNamespace(size=lambda: 1, rank=lambda: 0),
        sequence_parallel=False,
        weight=weight,
        config=SimpleNamespace(gradient_accumulation_fusion=fused),
    )
    return vocabulary_loss(hidden, cast(Any, layer), labels)


def loss_reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """hidden (S, B, H), weight (V, H), labels (B, S) -> (B, S)."""
    logits = hidden @ weight.T
    return F.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")


# Forward: the logits. Backward: a logit's rounding is its softmax's times the logit, up to 13 among 131,072 of them,
# and the softmax up to 0.3 of the gradient's norm, whose other part is the label's 1: as many as 13 * 0.3 squared; the
# gradient of the logits, and the result.
VOCABULARY_LOSS = KernelFamily(
    needs=("triton",), inputs=_inputs, kernel=_loss, reference=loss_reference, forward=1, backward=17, on_cpu=True
)
