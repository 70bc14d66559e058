"""The te and torch specs from equal weights compute the same losses and gradients, and so do layouts on two GPUs.

Bounds. A model of 8 layers and two MTP depths chains about 50 matrix products, forwards and backwards. In FP32 the te
spec multiplies in TF32 and the torch spec does not: both operands rounded to 2^-11, errors adding as a random walk:
sqrt(2 * 50 / 3) * 2^-11 = 2.8e-3 of a gradient's norm, and a factor 2. In BF16 each spec rounds about three times a
product to 2^-9: sqrt(2 * 3 * 50 / 3) * 2^-9 = 2e-2. These hold for the median over parameters: where rounding flips a
routing decision, the gradients of two experts change as a whole. Between layouts of one spec only the order of sums
differs, 2^-24, which flips the rounding of a share 2^-24 / 2^-11 of the TF32 operands: sqrt(50) * 2^-10 * sqrt(2^-13) =
8e-5, and a factor 4; BF16 as above. Losses are means over 256 tokens: a tenth of the gradients' bounds.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from each_world import measure_each
from launch import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
    pytest.mark.skipif(importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"),
]

BETWEEN_SPECS = {"fp32": 5.6e-3, "bf16": 2e-2}
BETWEEN_LAYOUTS = {"fp32": 3.2e-4, "bf16": 2e-2}
LAYOUTS: dict[str, dict[str, dict[str, Any]]] = {
    "fp32": {
        "dp2_plain": {"distributed_optimizer": False},
        "dp2_overlap": {"overlap": True},
        "tp2": {"tp": 2},
        "tp2_ep2": {"tp": 2, "ep": 2},
        "ep2": {"ep": 2},
        "cp2_isolated": {"cp": 2},
        "pp2": {"pp": 2},
        "pp2_vpp2": {"pp": 2, "vpp": 2, "stack": "ME|M*|ME|-*"},
    },
    # What computes otherwise in BF16: experts' counts stay on the GPU, and attention is fused.
    "bf16": {
        "dp2": {},
        "ep2": {"ep": 2},
        "ep2_gathered": {"ep": 2, "dispatcher": "allgather"},
        "ep2_overlap": {"ep": 2, "dispatcher": "allgather", "overlap": True},
        "cp2": {"cp": 2, "isolate_documents": False},
        "cp2_isolated": {"cp": 2},
    },
}
CASES = [(dtype, layout) for dtype, layouts in LAYOUTS.items() for layout in layouts]


def _worlds(spec: str, dtype: str, layouts: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    common = {"device": "cuda", "spec": spec, "dtype": dtype}
    return {f"{spec}_{dtype}_{name}": common | options for name, options in layouts.items()}


@pytest.fixture(scope="module")
def one_gpu(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("gradients")
    alone = {
        "one": {},
        "open": {"isolate_documents": False},
        "full": {"recompute": "full"},
        "router": {"router_fusion": True},
    }
    worlds: dict[str, dict[str, Any]] = {}
    for dtype in BETWEEN_SPECS:
        worlds |= _worlds("te", dtype, alone) | _worlds("torch", dtype, {"one": {}})
    return folder, run_ranks(measure_each, 1, timeout_s=500, folder=str(folder), worlds=worlds)[0]


@pytest.fixture(scope="module")
def two_gpus(one_gpu: tuple[Path, dict[str, Any]]) -> dict[str, Any]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    worlds = {name: world for dtype, some in LAYOUTS.items() for name, world in _worlds("te", dtype, some).items()}
    results: dict[str, Any] = run_ranks(measure_each, 2, timeout_s=500, folder=str(one_gpu[0]), worlds=worlds)[0]
    return results


@pytest.mark.parametrize("dtype", BETWEEN_SPECS)
def test_specs_agree(dtype: str, one_gpu: tuple[Path, dict[str, Any]]) -> None:
    folder, results = one_gpu
    te, reference = f"te_{dtype}_one", f"torch_{dtype}_one"
    weights = [dict(np.load(folder / f"{name}_weights.npz")) for name in (te, reference)]
    assert all(np.array_equal(weights[0][name], value) for name, value in weights[1].items())
    _compare(folder, results[te], results[reference], (te, reference), BETWEEN_SPECS[dtype])


@pytest.mark.parametrize("dtype", BETWEEN_SPECS)
@pytest.mark.parametrize("what", ["full", "router"])
def test_recomputation_and_the_routers_kernels_change_nothing(
    what: str, dtype: str, one_gpu: tuple[Path, dict[str, Any]]
) -> None:
    folder, results = one_gpu
    found, reference = f"te_{dtype}_{what}", f"te_{dtype}_one"
    _compare(folder, results[found], results[reference], (found, reference), BETWEEN_LAYOUTS[dtype])


@pytest.mark.parametrize(("dtype", "layout"), CASES)
def test_two_gpus_equal_one(
    dtype: str, layout: str, one_gpu: tuple[Path, dict[str, Any]], two_gpus: dict[str, Any]
) -> None:
    folder, alone = one_gpu
    found, reference = f"te_{dtype}_{layout}", f"te_{dtype}_{'open' if layout == 'cp2' else 'one'}"
    _compare(folder, two_gpus[found], alone[reference], (found, reference), BETWEEN_LAYOUTS[dtype])


def _compare(folder: Path, found: Any, expected: Any, names: tuple[str, str], bound: float) -> None:
    assert not isinstance(found, str), found
    mine, reference = (dict(np.load(folder / f"{name}_gradients.npz")) for name in names)
    assert mine.keys() == reference.keys()
    distances = [np.linalg.norm(mine[name] - value) / np.linalg.norm(value) for name, value in reference.items()]
    losses = [
        abs(a - b) / b
        for x, y in zip(found, expected, strict=True)
        for a, b in zip(x["losses"], y["losses"], strict=True)
    ]
    print(f"{names[0]}: median {np.median(distances):.1e}, worst {max(distances):.1e}, losses {max(losses):.1e}")
    assert np.median(distances) < bound
    assert max(losses) < bound / 10
