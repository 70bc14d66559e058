"""Weight gradients that linears add to ``main_grad`` themselves, against those that autograd hands to DDP.

Several micro-batches, two steps, a block that both MTP depths run through, grouped experts, the loss in one pass with
its output layer. On CPU as in test_te_lowering, and with Triton's interpreter:

    TRANSFORMER_ENGINE_SOURCES=FOLDER python -m pytest tests/parity/test_te_fusion.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "distributed")]

import te_fusion
from launch import run_ranks

FOLDER = "TRANSFORMER_ENGINE_SOURCES"
pytestmark = [pytest.mark.skipif(FOLDER not in os.environ, reason=f"{FOLDER} is not set"), pytest.mark.timeout(1200)]

NVFP4 = "{default: nvfp4, nvfp4: {stochastic_rounding: null}}"
WORLDS: dict[str, dict[str, Any]] = {
    "fp32": {"options": {}, "policy": "{default: bf16}"},
    "fp32_mxfp8": {"options": {}, "policy": "{default: mxfp8}"},
    "bf16_device_counts": {"options": {"dtype": "bf16"}, "policy": "{default: bf16}", "device_counts": True},
    "bf16_device_counts_overlapped": {
        "options": {"dtype": "bf16", "overlap": True},
        "policy": "{default: bf16}",
        "device_counts": True,
    },
    "bf16_nvfp4_device_counts": {"options": {"dtype": "bf16"}, "policy": NVFP4, "device_counts": True},
}
UNREPAIRED = {name: WORLDS[name] | {"repaired": False} for name in ("fp32", "fp32_mxfp8")}

USES = 3
"""Of one weight in one micro-batch, at most: the output layer's, for the main prediction and two depths."""
CANCELLED = 4
"""Norms of all summands together, or of a partial sum, over the norm of their sum: less than this here."""
FLOAT32 = 2 * te_fusion.MICRO_BATCHES * USES * CANCELLED * 2**-24
"""The same summands in another order: each addition rounds a partial sum."""
BF16 = USES * CANCELLED * 2**-9
"""Autograd's gradients are BF16: each summand is rounded, and so is each sum over the uses."""


@pytest.fixture(scope="module")
def found() -> Any:
    worlds = WORLDS | {f"{name}_unrepaired": world for name, world in UNREPAIRED.items()}
    return run_ranks(te_fusion.differences, 1, timeout_s=1000, env={"TRITON_INTERPRET": "1"}, worlds=worlds)[0]


@pytest.mark.parametrize("world", WORLDS)
def test_gradients_are_those_without_fusion(world: str, found: Any) -> None:
    assert len(found[world]) == te_fusion.STEPS
    for distances in found[world]:
        bound = BF16 if world.startswith("bf16") else FLOAT32
        assert max(distances.values()) < bound


def test_a_weight_used_once_in_a_micro_batch_gets_the_same_bits(found: Any) -> None:
    for distances in (step for world in ("fp32", "fp32_mxfp8") for step in found[world]):
        once = {name: d for name, d in distances.items() if not name.startswith(("mtp.", "output_layer."))}
        assert len(once) > 50
        assert not any(once.values())


@pytest.mark.parametrize(("world", "steps"), [("fp32", [0]), ("fp32_mxfp8", [0, 1])])
def test_a_shared_block_would_lose_a_depth(world: str, steps: list[int], found: Any) -> None:
    """Without the builder's repair: at the first micro-batch of the first step, of every step where precision is
    emulated (Megatron-Core then tells modules that a step begins)."""
    for step in steps:
        distances = found[f"{world}_unrepaired"][step]
        assert distances["mtp.layers.0.eh_proj.weight"] > 0.1
        assert distances["mtp.layers.0.mtp_model_layer.layers.0.self_attention.linear_qkv.weight"] > 0.1
        assert max(d for name, d in distances.items() if not name.startswith("mtp.")) < FLOAT32


@pytest.mark.parametrize("device_counts", [False, True])
def test_checkpoints_hold_tensors_only(device_counts: bool) -> None:
    """Experts have a blob each, numbered from the second on; the torch spec has none and could not load them."""
    assert run_ranks(te_fusion.blobs_of_checkpoint, 1, timeout_s=200, device_counts=device_counts) == [[]]
