"""The tensors of a model with ModelOpt's calibrated quantisers, in the published layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from modelopt.torch.quantization.nn import NVFP4StaticQuantizer, TensorQuantizer
from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl
from torch import Tensor, nn

from nemotron3_megatron.checkpoint.huggingface.mapping import Entry, entries
from nemotron3_megatron.checkpoint.huggingface.shards import Item, Spec
from nemotron3_megatron.checkpoint.quantised import layout
from nemotron3_megatron.checkpoint.quantised.calibration import CACHED
from nemotron3_megatron.checkpoint.quantised.layout import Algorithm
from nemotron3_megatron.checkpoint.quantised.model_reader import ModelReader
from nemotron3_megatron.checkpoint.quantised.published import Narrow
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.precision.formats import e2m1, mxfp8, nvfp4

ALGORITHM: dict[Narrow, Algorithm] = {"nvfp4": "NVFP4", "fp8": "FP8"}
SMALLEST_AMAX = 2.0**-24
"""ModelOpt takes 1 in place of a tensor's amax up to this (``quantization/tensor_quant.py``)."""
SMALLEST_SCALE = 2.0**-9
"""Of E4M3's positive numbers."""


def calibrated_items(
    model: nn.Module, reader: ModelReader, config: ModelConfig, formats: Mapping[str, Narrow]
) -> Iterator[Item]:
    """Every tensor of the model; quantised linears as codes and scales that stand for what ModelOpt's forward read.

    Args:
        model: calibrated.
        reader: of its weights.
        config: its architecture.
        formats: of its quantised linears, by the plan's name.
    """
    for entry in entries(config):
        narrow = formats.get(entry.module or "")
        if narrow is None:
            spec = Spec(entry.name, entry.shape, reader.dtype(entry))
            yield Item((spec,), partial(_as_it_is, reader, entry))
        else:
            module: Any = model.get_submodule(entry.module or "")
            yield Item(layout.specs(entry, ALGORITHM[narrow]), partial(_quantised, module, reader, entry, narrow))
        if entry.name.endswith((".k_proj.weight", ".v_proj.weight")) and entry.name.startswith("backbone."):
            yield _cache_scale(model, entry)


def descriptions(config: ModelConfig, formats: Mapping[str, Narrow]) -> tuple[dict[str, Any], dict[str, Any]]:
    """See :func:`layout.descriptions`."""
    linears = [entry for entry in entries(config) if entry.module]
    found = {layout.linear(each): formats.get(each.module or "") for each in linears}
    algorithms = {name: ALGORITHM[narrow] for name, narrow in found.items() if narrow}
    exclude = ["lm_head", *(name for name, narrow in found.items() if not narrow)]
    return layout.descriptions(algorithms, exclude, cache="FP8")


def fp8_scale(amax: Tensor) -> Tensor:
    """() float32: what ModelOpt's fake quantisation multiplies E4M3 codes by, about amax / 448.

    ModelOpt has two implementations, of which one runs where its extension compiles, and they round differently: the
    factor is read off the one that runs, by a number that becomes code 256, whose product is exact.

    Args:
        amax: one element.
    """
    amax = amax.float().reshape(())
    number = torch.where(amax <= SMALLEST_AMAX, 1.0, amax) * (256 / mxfp8.E4M3_MAX)
    factor: Tensor = scaled_e4m3_impl(number, amax) / 256
    return factor


def fp8_codes(read: Tensor, scale: Tensor) -> Tensor:
    """E4M3 codes of products of codes and ``scale``, which may be rounded to BF16: neighbours are further apart."""
    return (read.float() / scale).to(torch.float8_e4m3fn)


def nvfp4_codes(weight: Tensor, quantiser: NVFP4StaticQuantizer) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes (N, K / 2), E4M3 scales (N, K / 16) and the tensor's scale () of a weight (N, K).

    ModelOpt's own packing (``NVFP4QTensor``) rounds both scales differently from its fake quantisation, and many BF16
    weights lie half-way between two codes, where their last bit decides. So on CUDA codes are read off the weight that
    fake quantisation gives, whatever way its kernel divides; on a CPU, which has no kernel, they are rounded here.
    """
    largest = quantiser.global_amax.float() / e2m1.MAX
    factors = scaled_e4m3_impl(quantiser.amax.float() / e2m1.MAX, largest).view(len(weight), -1, 1)
    scale = fp8_scale(largest)
    # A block that is read as zeros has codes 0 and, as ModelOpt writes it, the smallest scale in place of 0.
    scales = (factors / scale).clamp(min=SMALLEST_SCALE).to(torch.float8_e4m3fn).squeeze(-1)
    read = quantiser(weight) if weight.is_cuda else weight
    blocks = read.float().view(len(weight), -1, nvfp4.BLOCK)
    codes = e2m1.encode_nearest(torch.where(factors == 0, 0.0, blocks / factors)).view(weight.shape)
    return layout.pack(codes), scales, scale


def _as_it_is(reader: ModelReader, entry: Entry) -> tuple[Tensor]:
    return (reader.tensor(entry),)


def _quantised(module: Any, reader: ModelReader, entry: Entry, narrow: Narrow) -> list[Tensor]:
    weight, quantiser = reader.tensor(entry), module.weight_quantizer
    if not isinstance(quantiser, TensorQuantizer):  # the experts', one each
        quantiser = quantiser[entry.boxes[0].start[0]]
    weight, amax = weight.to(quantiser.amax.device), module.input_quantizer.amax
    if narrow == "fp8":
        scale = fp8_scale(quantiser.amax)
        tensors = [fp8_codes(quantiser(weight), scale), scale, fp8_scale(amax)]
    else:
        # ModelOpt's kernel divides by the two numbers' product, too.
        tensors = [*nvfp4_codes(weight, quantiser), amax.float().reshape(()) / (e2m1.MAX * nvfp4.E4M3_MAX)]
    return [tensor.cpu() for tensor in tensors]


def _cache_scale(model: nn.Module, entry: Entry) -> Item:
    """``k_scale`` or ``v_scale``: what takes cached E4M3 codes back."""
    assert entry.module is not None
    attention = model.get_submodule(entry.module.removesuffix("linear_qkv") + "core_attention")
    linear = layout.linear(entry)
    letter = linear.rpartition(".")[2][0]
    quantiser = getattr(attention, next(name for name in CACHED if name.startswith(letter)))
    scale = fp8_scale(quantiser.amax).cpu()
    return Item((Spec(f"{linear}.{letter}_scale", (), torch.float32),), lambda: (scale,))
