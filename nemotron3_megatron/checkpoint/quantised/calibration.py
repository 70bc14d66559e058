"""Quantisers put into a model and calibrated, by ModelOpt."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch import nn

from nemotron3_megatron.checkpoint.quantised import modules  # noqa: F401 (tells ModelOpt of our layers)
from nemotron3_megatron.checkpoint.quantised.published import FORMATS, LEAF, Narrow, Settings
from nemotron3_megatron.config.errors import UserError

Search = Literal["mse", "max"]
"""How the scales of NVFP4 weights are found. mse, as published: of all E4M3 numbers, the one that leaves the least
squared error in a block; max: the block's largest magnitude."""

_FP8: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
_BLOCKS: dict[int | str, Any] = {-1: 16, "scale_bits": (4, 3)}
QUANTISERS: dict[Narrow, dict[str, dict[str, Any]]] = {
    "nvfp4": {
        "weight_quantizer": {"num_bits": (2, 1), "block_sizes": _BLOCKS | {"type": "static"}},
        "input_quantizer": {"num_bits": (2, 1), "block_sizes": _BLOCKS | {"type": "dynamic"}},
    },
    "fp8": {"weight_quantizer": _FP8, "input_quantizer": _FP8},
}
"""In ModelOpt's words: E2M1 in blocks of 16 with E4M3 scales, found beforehand for weights and from the numbers
themselves for inputs; E4M3 with one scale for the tensor."""

ALGORITHMS: dict[Search, dict[str, Any]] = {"mse": {"method": "mse", "fp8_scale_sweep": True}, "max": {"method": "max"}}
CACHED = ("k_bmm_quantizer", "v_bmm_quantizer")


def quantiser_config(settings: Settings, search: Search) -> dict[str, Any]:
    """What ``modelopt.torch.quantization.quantize`` takes: everything off, then the published linears and caches on."""
    layer = "decoder.layers.*"
    rules: list[dict[str, Any]] = [{"quantizer_name": "*", "enable": False}]
    for role, narrow in FORMATS[settings].items():
        for quantiser, numbers in QUANTISERS[narrow].items():
            rules.append({"quantizer_name": f"{layer}.{LEAF[role]}.{quantiser}", "cfg": numbers, "enable": True})
    for quantiser in CACHED:
        rules.append(
            {"quantizer_name": f"{layer}.self_attention.core_attention.{quantiser}", "cfg": _FP8, "enable": True}
        )
    return {"quant_cfg": rules, "algorithm": ALGORITHMS[search]}


def calibrate(
    model: nn.Module,
    settings: Settings,
    search: Search,
    wanted: Mapping[str, Narrow],
    cached: Iterable[str],
    forward: Callable[[nn.Module], object],
) -> None:
    """Put quantisers into a model and find their scales; the weights stay as they are.

    Args:
        model: on the device that is to run it, with weights.
        settings: see ``published.py``.
        search: see :data:`Search`.
        wanted: format of every linear that is to be quantised, by name.
        cached: names of the attention modules whose keys and values are to be.
        forward: reads the calibration's sequences through the model.

    Raises:
        UserError: a quantiser saw nothing but zeros, or a number that is not finite.
        RuntimeError: a quantiser is on that should be off, or the other way round.
    """
    mtq.quantize(model, quantiser_config(settings, search), forward)
    quantisers = {name: each for name, each in model.named_modules() if isinstance(each, TensorQuantizer)}
    found = {name: each for name, each in quantisers.items() if each.is_enabled}
    linears = {_owner(name) for name in found if not name.endswith(CACHED)}
    caches = {_owner(name) for name in found if name.endswith(CACHED)}
    expected = {f"{name}.core_attention" for name in cached}
    if linears != set(wanted) or caches != expected:
        odd = sorted((linears ^ set(wanted)) | (caches ^ expected))
        raise RuntimeError(f"ModelOpt quantises other modules than it should: {', '.join(odd[:5])} ({len(odd)} in all)")
    for name, quantiser in found.items():
        _require_amax(name, quantiser)


def _owner(quantiser: str) -> str:
    """The module whose quantiser has this name; an expert's has a number behind it."""
    return quantiser.rstrip("0123456789").rstrip(".").rpartition(".")[0]


def _require_amax(name: str, quantiser: TensorQuantizer) -> None:
    amax = quantiser.amax
    if amax is None or not bool(torch.isfinite(amax).all()) or not bool((amax > 0).any()):
        what = "nothing" if amax is None else "nothing but zeros, or a number that is not finite"
        raise UserError(name, why=f"its quantiser saw {what} in the calibration", nearest="more sequences")
