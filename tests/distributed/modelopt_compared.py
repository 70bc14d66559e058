"""What the tests of ``nemotron3 quantise`` compare: quantised weights, scales and files."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import NVFP4StaticQuantizer, TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from modelopt.torch.quantization.tensor_quant import scaled_e4m3_impl
from torch import Tensor

from nemotron3_megatron.checkpoint.huggingface.mapping import entries
from nemotron3_megatron.checkpoint.huggingface.shards import ShardReader
from nemotron3_megatron.checkpoint.quantised.calibrated import fp8_codes, fp8_scale, nvfp4_codes
from nemotron3_megatron.checkpoint.quantised.calibration import QUANTISERS
from nemotron3_megatron.checkpoint.quantised.model_reader import ModelReader
from nemotron3_megatron.checkpoint.quantised.read import read_linear
from nemotron3_megatron.config import Run
from nemotron3_megatron.platform import select
from nemotron3_megatron.precision.formats import nvfp4

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def extremes() -> dict[str, Any]:
    """FP8: largest magnitudes whose codes and scale do not stand for what fake quantisation gives. NVFP4: scales and
    values of blocks of 1, of 0 and of numbers too small beside 1."""
    generator = torch.Generator().manual_seed(5)
    wrong = []
    for exponent in range(-30, 31):
        weight = torch.randn(999, generator=generator) * 2.0**exponent
        amax = weight.abs().max() * torch.rand((), generator=generator)  # some saturate
        scale = fp8_scale(amax)
        for dtype in (torch.float32, torch.bfloat16):
            read = scaled_e4m3_impl(weight.to(dtype), amax)
            if not torch.equal((fp8_codes(read, scale).float() * scale).to(dtype), read):
                wrong.append(float(amax))
    weight = torch.tensor([1.0, 0.0, 1e-7])[:, None].expand(3, 16).contiguous().to(select("auto").device)
    quantiser = TensorQuantizer(QuantizerAttributeConfig(**QUANTISERS["nvfp4"]["weight_quantizer"])).to(weight.device)
    quantiser.amax = weight.abs().amax(1, keepdim=True)
    NVFP4StaticQuantizer.from_tensor_quantizer(quantiser, weight.max())
    packed, scales, scale = (each.cpu() for each in nvfp4_codes(weight, quantiser))
    values = _dequantised({"w": packed, "w_scale": scales, "w_scale_2": scale}, "w")
    return {"fp8": wrong, "scales": scales.flatten().tolist(), "values": values.amax(1).tolist()}


def weights_by_kind(
    model: Any, run: Run, formats: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, dict[str, int]]:
    """By format: numbers of weights that the export gives otherwise than ModelOpt's forward reads them, by kind."""
    found: dict[str, dict[str, int]] = {}
    for kind in set(formats.values()):
        exported, read, trained = [], [], []
        for entry in (each for each in entries(run.model) if formats.get(each.module or "") == kind):
            pairs = list(model.get_submodule(entry.module).iter_weights_for_calibration())
            weight, quantiser = pairs[entry.boxes[0].start[0] if len(pairs) > 1 else 0]
            trained.append(weight.detach().cpu().flatten())
            read.append(quantiser(weight).detach().cpu().flatten())
            exported.append(_dequantised(tensors, entry.name).to(weight.dtype).flatten())
        found[kind] = _by_kind(*(torch.cat(each).double() for each in (exported, read, trained)))
    return found


def _by_kind(exported: Tensor, read: Tensor, trained: Tensor) -> dict[str, int]:
    """last_bit: neighbours in BF16, the same code; tie: another code, the weight half-way as well as BF16 can tell;
    zero: one of the two is zero; code: another code."""
    larger = torch.maximum(exported.abs(), read.abs())
    left = exported != read
    counts = {"all": len(left)}
    kinds = {
        "last_bit": (exported - read).abs() <= 2**-7 * larger,
        "tie": (trained - (exported + read) / 2).abs() <= 2**-8 * larger,
        "zero": (exported == 0) | (read == 0),
        "code": torch.ones_like(left),
    }
    for name, matches in kinds.items():
        counts[name] = int((left & matches).sum())
        left = left & ~matches
    return counts


def differs_from_others(
    model: Any, reader: ModelReader, run: Run, formats: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, float]:
    """Shares of NVFP4 weights' scales and codes that are not those of

    - training: the training formats' own arithmetic (for ``search="max"``);
    - kernel: the scales that ModelOpt's kernel is given;
    - packer: the codes of ModelOpt's packing with our scales.
    """
    different: dict[str, list[Tensor]] = {
        name: [] for name in ("training_scales", "training_codes", "kernel", "packer")
    }
    for entry in (each for each in entries(run.model) if formats.get(each.module or "") == "nvfp4"):
        weight, codes, scales = reader.tensor(entry), tensors[entry.name], tensors[f"{entry.name}_scale"]
        ours = nvfp4.quantize(weight)
        different["training_scales"].append(ours.scales.float() != scales.float())
        different["training_codes"].append(E2M1[ours.codes.long()] != _values(codes))
        quantiser = model.get_submodule(entry.module).weight_quantizer[entry.boxes[0].start[0]]
        factors = scaled_e4m3_impl(quantiser.amax.float() / 6.0, quantiser.global_amax.float() / 6.0)
        different["kernel"].append(
            factors.cpu().view(scales.shape) != scales.float() * tensors[f"{entry.name}_scale_2"]
        )
        packed, _, _ = NVFP4QTensor.quantize(weight.clone(), 16, scales, tensors[f"{entry.name}_scale_2"])
        different["packer"].append(_values(packed._quantized_data.cpu()) != _values(codes))
    return {
        name: float(torch.cat([each.flatten() for each in parts]).double().mean()) for name, parts in different.items()
    }


def apart(written: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, float]:
    """The largest distance between tensors of a name, relative to their largest number; by the name's last word."""
    found = dict.fromkeys(written.keys() ^ tensors.keys(), math.inf)
    for name in written.keys() & tensors.keys():
        a, b = written[name].double(), tensors[name].double()
        if not torch.equal(a, b):
            word = name.rpartition(".")[2]
            found[word] = max(found.get(word, 0.0), float((a - b).abs().max() / torch.maximum(a, b).abs().max()))
    return found


def read_back(directory: Path, tensors: dict[str, Tensor]) -> float:
    """The largest difference, relative to the value, between ``read_linear`` and the layout's definition in float32."""
    reader, worst = ShardReader(directory), 0.0
    for name in (name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")):
        expected = _dequantised(tensors, f"{name}.weight")
        found = read_linear(reader, name, torch.float32).dequantize()
        worst = max(worst, float(((found - expected).abs() / expected.abs().clamp(min=1e-30)).max()))
    return worst


def _dequantised(tensors: dict[str, Tensor], name: str) -> Tensor:
    """From the layout's definition, in float32."""
    codes, scale = tensors[name], tensors[f"{name}_scale"].float()
    if codes.dtype == torch.float8_e4m3fn:
        return codes.float() * scale
    return _values(codes) * (scale * tensors[f"{name}_scale_2"]).repeat_interleave(16, -1)


def _values(packed: Tensor) -> Tensor:
    """(N, K / 2) bytes -> (N, K) E2M1 numbers."""
    return E2M1[torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2).long()]
