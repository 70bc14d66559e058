"""How ModelOpt lays out a quantised linear, and how it says which linear has which format.

Names, types and shapes: NVIDIA Model-Optimizer (``torch/export/quant_utils.py``, ``convert_hf_config.py``,
``quantization/qtensor/{nvfp4,mxfp8}_tensor.py``) and vLLM (``quantization/modelopt.py``), read in November 2026.

    NVFP4 of (N, K)    weight (N, K / 2) uint8: element 2i in the low half of byte i, 2i + 1 in the high half
                       weight_scale (N, K / 16) float8_e4m3fn
                       weight_scale_2 () float32: amax / 2688
                       input_scale () float32: the same of the linear's input
    MXFP8 of (N, K)    weight (N, K) float8_e4m3fn
                       weight_scale (N, K / 32) uint8: E8M0 exponents
    FP8 of (N, K)      weight (N, K) float8_e4m3fn
                       weight_scale () float32: amax / 448
                       input_scale () float32: the same of the linear's input
    FP8 cache          k_proj.k_scale, v_proj.v_scale () float32: the same of keys and values
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from nemotron3_megatron import __version__
from nemotron3_megatron.checkpoint.huggingface.mapping import Entry
from nemotron3_megatron.checkpoint.huggingface.shards import Spec
from nemotron3_megatron.precision.formats import mxfp8, nvfp4

Algorithm = Literal["NVFP4", "W4A16_NVFP4", "MXFP8", "FP8"]
"""ModelOpt's names; W4A16: inputs stay as they are, so that no ``input_scale`` is needed."""

GROUP: dict[Algorithm, int] = {"NVFP4": nvfp4.BLOCK, "W4A16_NVFP4": nvfp4.BLOCK, "MXFP8": mxfp8.BLOCK}
"""Elements of a row that share a scale; FP8 has one scale for the tensor."""

DESCRIPTION = "hf_quant_config.json"


def specs(entry: Entry, algorithm: Algorithm) -> tuple[Spec, ...]:
    """The tensors that take the place of a weight."""
    rows, columns = entry.shape
    inputs = Spec(f"{linear(entry)}.input_scale", (), torch.float32)
    if algorithm == "FP8":
        weight = Spec(entry.name, entry.shape, torch.float8_e4m3fn)
        return weight, Spec(f"{entry.name}_scale", (), torch.float32), inputs
    scales = (rows, columns // GROUP[algorithm])
    if algorithm == "MXFP8":
        weight = Spec(entry.name, entry.shape, torch.float8_e4m3fn)
        return weight, Spec(f"{entry.name}_scale", scales, torch.uint8)
    packed = (
        Spec(entry.name, (rows, columns // 2), torch.uint8),
        Spec(f"{entry.name}_scale", scales, torch.float8_e4m3fn),
        Spec(f"{entry.name}_scale_2", (), torch.float32),
    )
    return packed if algorithm == "W4A16_NVFP4" else (*packed, inputs)


def linear(entry: Entry) -> str:
    """The published name of the linear whose weight an entry is."""
    return entry.name.removesuffix(".weight")


def pack(codes: Tensor) -> Tensor:
    """(N, K) codes -> (N, K / 2) bytes."""
    return codes[:, ::2] | (codes[:, 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """(N, K / 2) bytes -> (N, K) codes."""
    return torch.stack([packed & 0xF, packed >> 4], -1).flatten(-2)


def descriptions(
    algorithms: Mapping[str, Algorithm], exclude: list[str], cache: Literal["FP8"] | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Contents of ``hf_quant_config.json``, and of ``quantization_config`` in ``config.json``.

    Args:
        algorithms: by published name, of every quantised linear.
        exclude: published names of the linears that are not.
        cache: of keys and values; None: as they are.
    """
    layers = {name: {"quant_algo": found, **_group(found)} for name, found in algorithms.items()}
    producer = {"name": "nemotron3-megatron", "version": __version__}
    common: dict[str, Any] = {"quant_algo": "MIXED_PRECISION", "quantized_layers": layers}
    if len(set(algorithms.values())) == 1:
        common = next(iter(layers.values()))
    own_file = {
        "producer": producer,
        "quantization": {**common, "kv_cache_quant_algo": cache, "exclude_modules": exclude},
    }
    in_config = {
        **common,
        "quant_method": "modelopt",
        "producer": producer,
        "ignore": exclude,
        "config_groups": _groups(algorithms),
    }
    if cache is not None:
        in_config["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}
    return own_file, in_config


def _group(algorithm: Algorithm) -> dict[str, int]:
    return {"group_size": GROUP[algorithm]} if algorithm in GROUP else {}


def _groups(algorithms: Mapping[str, Algorithm]) -> dict[str, Any]:
    groups = {}
    for index, algorithm in enumerate(sorted(set(algorithms.values()))):
        bits = 8 if algorithm in ("MXFP8", "FP8") else 4
        numbers = {"dynamic": False, "num_bits": bits, "type": "float", **_group(algorithm)}
        both = (
            {"weights": numbers} if algorithm == "W4A16_NVFP4" else {"weights": numbers, "input_activations": numbers}
        )
        targets = sorted(name for name, found in algorithms.items() if found == algorithm)
        groups[f"group_{index}"] = {**both, "targets": targets}
    return groups
