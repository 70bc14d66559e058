"""The router in FP32: weight, input and logits."""

from __future__ import annotations

from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor


class Float32Router(TopKRouter):  # type: ignore[misc]
    """``TopKRouter`` with an FP32 weight in a BF16 model (``builder.FLOAT32_PARAMETERS``).

    Megatron-Core rounds the weight to the model's type and only multiplies in FP32; its fused GEMM refuses
    operands of two types, so the input is widened first.
    """

    def gating(self, input: Tensor) -> Tensor:
        """Hidden states (S, B, H) -> logits (S, B, experts) float32."""
        logits: Tensor = super().gating(input.to(self.weight.dtype))
        return logits
