"""Multi-token prediction inside packed sequences."""

from __future__ import annotations

from typing import Any

from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionLayer
from torch import Tensor


class PackedMTPLayer(MultiTokenPredictionLayer):  # type: ignore[misc]
    """One MTP depth whose token shift runs over the whole sequence.

    Megatron-Core shifts each packed document by itself, in a Python loop over document boundaries. Here targets
    that cross a boundary carry no loss (``MicroBatch.loss_mask``), so the plain shift is enough and costs nothing.
    """

    def _get_embeddings(self, *args: Any, packed_seq_params: object = None, **kwargs: Any) -> tuple[Tensor | None, ...]:
        shifted: tuple[Tensor | None, ...] = super()._get_embeddings(*args, packed_seq_params=None, **kwargs)
        return shifted
