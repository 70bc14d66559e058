"""Precision plans lowered onto real models of Transformer Engine's linears, on CPU.

Megatron-Core's and Transformer Engine's own Python runs; only the compiled backend is replaced (te_on_cpu.py). Like
test_te_formats this needs TE's sources:

    TRANSFORMER_ENGINE_SOURCES=FOLDER python -m pytest tests/parity/test_te_lowering.py

where FOLDER holds the unpacked wheels of transformer_engine, transformer_engine_cu13 and transformer_engine_torch.

Tolerance of emulated products: models are float32 here, in which a folded scale costs 2^-24; else as in
tests/distributed/test_emulation.py.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]

import te_lowering
from launch import run_ranks

FOLDER = "TRANSFORMER_ENGINE_SOURCES"
pytestmark = pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} is not set")

MODULES = 33
TOLERANCE = 23 * 8 * 2**-24

NEMOTRON3 = """
default: nvfp4
rules:
  - {layers: [last 2], format: bf16}
  - {role: [attention.qkv, attention.proj], format: bf16}
  - {role: [moe.latent_down, moe.latent_up], format: bf16}
  - {block: mtp, format: bf16}
  - {role: mamba.out_proj, format: mxfp8}
"""
ALL_MXFP8 = "{default: mxfp8}"
ABLATION = "{default: nvfp4, nvfp4: {hadamard: null, stochastic_rounding: null, weight_block: [1, 16]}}"

NATIVE: dict[str, tuple[int, dict[str, Any], str]] = {
    "one": (1, {}, NEMOTRON3),
    "mxfp8": (1, {}, ALL_MXFP8),
    "ablation": (1, {}, ABLATION),
    "pp2": (2, {"pp": 2}, NEMOTRON3),
    "pp2_vpp2": (2, {"pp": 2, "vpp": 2, "stack": "ME|M*|ME|-*"}, NEMOTRON3),
    "pp4_vpp2": (4, {"pp": 4, "vpp": 2, "stack": "M|E|M|*|M|E|-|*"}, NEMOTRON3),
}
EMULATED: dict[str, tuple[int, dict[str, Any], str]] = {
    "nemotron3": (1, {}, NEMOTRON3 + "nvfp4: {stochastic_rounding: null}"),
    "everything": (1, {}, "{default: nvfp4, nvfp4: {stochastic_rounding: null, weight_block: [1, 16]}}"),
    "device_counts": (1, {"device_counts": True}, "{default: nvfp4, nvfp4: {stochastic_rounding: null}}"),
    "device_counts_mxfp8": (1, {"device_counts": True}, ALL_MXFP8),
    "ep2_device_counts": (2, {"ep": 2, "device_counts": True}, "{default: nvfp4, nvfp4: {stochastic_rounding: null}}"),
    "ep2_gathered": (2, {"ep": 2, "dispatcher": "allgather", "device_counts": True}, ALL_MXFP8),
    "tp2_ep2_device_counts": (2, {"tp": 2, "ep": 2, "device_counts": True}, ALL_MXFP8),
    "tp2_ep2": (2, {"tp": 2, "ep": 2}, "{default: nvfp4, nvfp4: {stochastic_rounding: null}}"),
    "tp2_mxfp8": (2, {"tp": 2}, ALL_MXFP8),
}


@pytest.fixture(scope="module")
def native() -> dict[str, list[dict[str, Any]]]:
    return _ranks("native", NATIVE)


@pytest.fixture(scope="module")
def emulated() -> dict[str, list[dict[str, Any]]]:
    return _ranks("emulated", EMULATED)


def _ranks(function: str, layouts: dict[str, tuple[int, dict[str, Any], str]]) -> dict[str, list[dict[str, Any]]]:
    """What every rank of each layout found; layouts of one size share their processes."""
    results: dict[str, list[dict[str, Any]]] = {}
    for nproc in {size for size, _, _ in layouts.values()}:
        worlds = {name: (options, policy) for name, (size, options, policy) in layouts.items() if size == nproc}
        ranks = run_ranks(te_lowering.each, nproc, timeout_s=900, what=function, worlds=worlds)
        results |= {name: [rank[name] for rank in ranks] for name in worlds}
    return results


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", NATIVE)
def test_native_modules_compute_as_planned_in_every_forward_pass(layout: str, native: Any) -> None:
    ranks, micro_batches = native[layout], NATIVE[layout][1].get("pp", 1)
    modules = {name: found for rank in ranks for name, found in rank.items()}
    assert sum(map(len, ranks)) == len(modules) == MODULES
    for name, (planned, announced, seen) in modules.items():
        assert announced == planned, name
        # MTP's two depths share their block.
        assert len(seen) == micro_batches * (2 if name.startswith("mtp") else 1), name
        for gemms, counts in seen:
            assert gemms == planned, name
            multiple = 32 if layout == "mxfp8" else 128
            assert all(count % multiple == 0 for count in counts), f"{name}: experts have {counts} tokens"


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("layout", EMULATED)
def test_emulated_modules_equal_their_recomputation(layout: str, emulated: Any) -> None:
    for rank in emulated[layout]:
        assert len(rank) == MODULES
        for name, (errors, planned, used) in rank.items():
            assert max(errors) < TOLERANCE, f"{name}: {errors}"
            assert used == planned, name


def test_random_numbers_are_the_default_generators_and_weight_gradients_are_added() -> None:
    found = run_ranks(te_lowering.single_modules, 1)[0]
    assert found == {"dx": True, "added dw": True, "marked": True, "another draw": True}


def test_a_module_that_is_not_as_planned_stops_the_run() -> None:
    found = run_ranks(te_lowering.mistakes, 1)[0]
    assert "inside a quantised context, None outside" in found["forgotten"]
    assert found["another"].startswith("PrecisionMismatchError")
    assert "decoder.layers.1.mlp.shared_experts.linear_fc1" in found["another"]
