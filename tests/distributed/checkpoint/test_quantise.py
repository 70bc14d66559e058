"""``nemotron3 quantise`` on a CPU, where ModelOpt rounds to FP8 and finds NVFP4's scales from largest magnitudes."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from launch import run_ranks

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("modelopt") is None, reason="needs nvidia-modelopt"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="what CUDA computes is in test_modelopt.py"),
]


def measure(folder: str, cases: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: ModelOpt takes a while to import, and changes Megatron-Core."""
    import modelopt_checks
    import modelopt_compared

    selections = modelopt_checks.selections(f"{folder}/selections")
    return modelopt_checks.measure(folder, cases) | {"selections": selections, "extremes": modelopt_compared.extremes()}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {
        "fp8": {"spec": "torch", "settings": "fp8", "search": "max", "distils": True},
        "nvfp4": {"spec": "torch", "settings": "nvfp4", "search": "max", "distils": False},
    }
    results: dict[str, Any] = run_ranks(measure, 1, folder=str(tmp_path_factory.mktemp("quantise")), cases=cases)[0]
    return results


def test_selects_what_the_published_recipe_selects(measured: dict[str, Any]) -> None:
    """ModelOpt's file says that MTP stays as trained, but has no rule that keeps it out."""
    found = measured["selections"]
    published = {name: numbers for name, numbers in found["published"].items() if not name.startswith("mtp.")}
    assert found["ours"] == published
    # Two Mamba layers and two MoE layers with 8 experts: inputs and weights; keys and values of one attention layer.
    assert len(published) == 2 * 2 * 2 + 2 * (2 * (1 + 8) + 2 * 2) + 2


@pytest.mark.parametrize("settings", ["fp8", "nvfp4"])
def test_writes_what_was_calibrated(settings: str, measured: dict[str, Any]) -> None:
    """Another process over the same sequences finds the same scales: files are bit for bit the calibrated model's."""
    assert measured[settings]["files_differ"] == {}
    assert measured[settings]["missing"] == []
    assert all(scale > 0 for scale in measured[settings]["scales"].values())
    assert len(measured[settings]["scales"]) == 2
    assert measured[settings]["read_back"] < 2**-20  # scales multiplied in another order, in float32


def test_says_which_linear_has_which_format(measured: dict[str, Any]) -> None:
    mixed, one = (measured[name]["description"]["quantization"] for name in ("nvfp4", "fp8"))
    layers = mixed["quantized_layers"]
    assert layers["backbone.layers.0.mixer.in_proj"] == {"quant_algo": "FP8"}
    assert layers["backbone.layers.1.mixer.experts.7.up_proj"] == {"quant_algo": "NVFP4", "group_size": 16}
    assert layers["backbone.layers.1.mixer.shared_experts.down_proj"] == {"quant_algo": "FP8"}
    assert one["quant_algo"] == "FP8"
    assert {"lm_head", "backbone.layers.2.mixer.o_proj", "mtp.layers.1.mixer.experts.0.up_proj"} <= {
        *one["exclude_modules"]
    }
    assert not layers.keys() & {*mixed["exclude_modules"]}
    assert mixed["kv_cache_quant_algo"] == one["kv_cache_quant_algo"] == "FP8"
    in_config = measured["nvfp4"]["config"]["quantization_config"]
    assert in_config["kv_cache_scheme"] == {"dynamic": False, "num_bits": 8, "type": "float"}
    assert in_config["quantized_layers"] == layers


def test_fp8_weights_are_those_of_the_quantised_model(measured: dict[str, Any]) -> None:
    """Bit for bit, with the scales of the calibration also after distillation. For the distance: test_modelopt.py."""
    for weights in (measured["fp8"]["weights"], measured["fp8"]["weights_after"]):
        assert weights["fp8"]["all"] > 1000
        assert weights["fp8"] == weights["fp8"] | {"last_bit": 0, "tie": 0, "zero": 0, "code": 0}
    assert 1e-3 < measured["fp8"]["distance"] < 0.4


def test_nvfp4_weights_are_what_modelopts_kernel_computes(measured: dict[str, Any]) -> None:
    """Its scales, from its Python part, which runs here; its rounding, as ModelOpt's packing has it with these scales.
    The kernel itself: test_modelopt.py."""
    found = measured["nvfp4"]["from_others"]
    assert found["kernel"] == found["packer"] == 0


def test_nvfp4_weights_are_nearly_those_of_training(measured: dict[str, Any]) -> None:
    """Both take a block's scale from block_amax * 448 / amax, with float32 products in another order: a number half-way
    between two E4M3 numbers, as quotients of 8-bit BF16 mantissas often are, may go to either side."""
    found = measured["nvfp4"]["from_others"]
    assert found["training_scales"] < 1e-2
    assert found["training_codes"] < 1e-2


def test_small_and_large_numbers(measured: dict[str, Any]) -> None:
    """FP8 of magnitudes from 2^-30, where ModelOpt takes 1 in place of amax. NVFP4: a block of ones beside amax 1 has
    the scale 448; one that is read as zeros the smallest."""
    found = measured["extremes"]
    assert found["fp8"] == []
    assert found["scales"] == [448.0, 2**-9, 2**-9]
    assert found["values"] == [pytest.approx(1.0, rel=2**-22), 0.0, 0.0]


def test_distillation_comes_nearer_to_the_teacher(measured: dict[str, Any]) -> None:
    """On sequences that neither calibration nor distillation read; each step's loss is the same divergence."""
    before, after = measured["fp8"]["kl"]
    assert after < 0.9 * before
    assert measured["fp8"]["moved"]
    assert measured["fp8"]["losses"][0] == pytest.approx(before, rel=0.5)
