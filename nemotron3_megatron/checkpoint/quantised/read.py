"""A quantised linear of an exported directory, read back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron3_megatron.checkpoint.huggingface.shards import ShardReader
from nemotron3_megatron.checkpoint.quantised import layout
from nemotron3_megatron.precision.formats import e2m1
from nemotron3_megatron.precision.formats.mxfp8 import MXFP8Tensor
from nemotron3_megatron.precision.formats.nvfp4 import E4M3_MAX, NVFP4Tensor


@dataclass(frozen=True, slots=True, eq=False)
class FP8Tensor:
    """A matrix of E4M3 numbers with one scale."""

    codes: Tensor
    """(m, n) float8_e4m3fn."""
    scale: Tensor
    """() float32."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(m, n) values, computed in float32 and rounded to ``dtype``."""
        return (self.codes.float() * self.scale).to(dtype)


def read_linear(
    reader: ShardReader, name: str, dtype: torch.dtype = torch.bfloat16
) -> NVFP4Tensor | MXFP8Tensor | FP8Tensor:
    """Codes and scales of the linear with the published ``name``, in training's terms.

    Args:
        reader: of the exported directory.
        name: such as ``backbone.layers.3.mixer.in_proj``.
        dtype: of the weights in training. An amax has this type; the file has amax / 2688, from which it comes back
            exactly in BF16, and within one unit in the last place in FP32.
    """
    codes, scales = reader.tensor(f"{name}.weight"), reader.tensor(f"{name}.weight_scale")
    if codes.dtype == torch.float8_e4m3fn:
        return FP8Tensor(codes, scales) if scales.dtype == torch.float32 else MXFP8Tensor(codes, scales)
    second = reader.tensor(f"{name}.weight_scale_2").double()
    amax = (second * (E4M3_MAX * e2m1.MAX)).to(dtype).float()
    return NVFP4Tensor(layout.unpack(codes), scales, amax, (1, 16))
