"""ModelOpt's quantised counterparts of our own layers; of Megatron-Core's and Transformer Engine's it has some.

Importing this module tells ModelOpt of them. Calibration runs in one process, so no amax is shared between ranks.
Shapes: T rows sorted by expert, S positions, B sequences, K key-value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from modelopt.torch.quantization.nn import GroupedQuantizer, QuantModule, QuantModuleRegistry, TensorQuantizer
from torch import Tensor

from nemotron3_megatron.model.attention import DocumentAttention
from nemotron3_megatron.model.layers import (
    DuplicatedLinear,
    GroupedLinear,
    LayerNormColumnParallelLinear,
    grouped_linear,
)
from nemotron3_megatron.platform import select


@QuantModuleRegistry.register(
    {
        LayerNormColumnParallelLinear: "nemotron3_LayerNormColumnParallelLinear",
        DuplicatedLinear: "nemotron3_DuplicatedLinear",
    }
)
class QuantisedLinear(QuantModule):  # type: ignore[misc]
    """Quantises what the layer multiplies: its norm comes before, communication is outside."""

    def _setup(self) -> None:
        self.input_quantizer, self.weight_quantizer = TensorQuantizer(), TensorQuantizer()

    def gemm(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., in) and weight (out, in) -> (..., out)."""
        return F.linear(self.input_quantizer(x), self.weight_quantizer(weight))


class QuantisedExperts(QuantModule):  # type: ignore[misc]
    """Each expert's weight has a quantiser; the inputs of all share one, as ModelOpt has it in Transformer Engine's."""

    num_gemms: int

    def _setup(self) -> None:
        self.input_quantizer = TensorQuantizer()
        self.weight_quantizer = GroupedQuantizer(*(TensorQuantizer() for _ in range(self.num_gemms)))

    def iter_weights_for_calibration(self) -> Iterator[tuple[Tensor, Any]]:
        """Each expert's weight and its quantiser."""
        for number, quantiser in enumerate(self.weight_quantizer):
            yield self.get_parameter(f"weight{number}"), quantiser

    def quantised_weights(self) -> list[Tensor]:
        """As the products read them."""
        return [quantiser(weight) for weight, quantiser in self.iter_weights_for_calibration()]


@QuantModuleRegistry.register({GroupedLinear: "nemotron3_GroupedLinear"})
class QuantisedGroupedLinear(QuantisedExperts):
    """Of the torch spec."""

    def gemm(self, x: Tensor, weights: Sequence[Tensor], tokens_per_expert: Sequence[int]) -> Tensor:
        """x (T, in) -> (T, out)."""
        return grouped_linear(self.input_quantizer(x), self.quantised_weights(), tokens_per_expert)


class QuantisedDeviceCountsLinear(QuantisedExperts):
    """Of the te spec: cumulative counts are on the GPU (``model/device_counts.py``)."""

    def forward(self, x: Tensor, ends: Tensor) -> tuple[Tensor, None]:
        """Rows (T, in) and the cumulative counts (E,) int32 -> (T, out)."""
        weights = torch.stack(self.quantised_weights()).transpose(1, 2)
        return torch._grouped_mm(self.input_quantizer(x), weights, offs=ends), None


@QuantModuleRegistry.register({DocumentAttention: "nemotron3_DocumentAttention"})
class QuantisedAttention(QuantModule):  # type: ignore[misc]
    """Attends to keys and values as they come from a quantised cache."""

    def _setup(self) -> None:
        self.k_bmm_quantizer, self.v_bmm_quantizer = TensorQuantizer(), TensorQuantizer()

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """query (S, B, N, D), key and value (S, B, K, D) -> (S, B, N * D)."""
        return super().forward(query, self.k_bmm_quantizer(key), self.v_bmm_quantizer(value), *args, **kwargs)


def _register_te_layers() -> None:
    from nemotron3_megatron.model.device_counts import DeviceCountsColumnLinear, DeviceCountsRowLinear
    from nemotron3_megatron.model.specs.te import DocumentTEAttention

    for layer in (DeviceCountsColumnLinear, DeviceCountsRowLinear):
        QuantModuleRegistry.register({layer: f"nemotron3_{layer.__name__}"})(QuantisedDeviceCountsLinear)
    QuantModuleRegistry.register({DocumentTEAttention: "nemotron3_DocumentTEAttention"})(QuantisedAttention)


if select("auto").default_spec == "te":
    _register_te_layers()
