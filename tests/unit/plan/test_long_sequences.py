"""Layers that take a long sequence in parts, as the plan sees them (``model/moe_parts.py``, ``mamba_parts.py``)."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.activation_shape import shape
from nemotron3_megatron.plan.activations import layer
from nemotron3_megatron.plan.memory import memory_plan

NANO_WIDTH, EXPERT, SHARED, TOPK, EXPERTS = 2688, 1856, 3712, 6, 16
ROW_BYTES = TOPK * 2 * (NANO_WIDTH + 2 * EXPERT)


def _slice(length: int, *more: str) -> Run:
    sizes = {"seq_length": length, "global_batch_size": 1, "tokens": f"{1000 * length} tokens"}
    overrides = [f"stages.phase1.{key}={value}" for key, value in sizes.items()]
    recipe, origins = compose(
        [
            "recipe=nano_bf16",
            "parallel=single",
            "model.pattern=MEM*EME",
            f"model.num_moe_experts={EXPERTS}",
            "~stages.phase2",
            "optimizer.lr_decay=null",
            "optimizer.lr_warmup=0 tokens",
            f"optimizer.lr_wsd_decay={length} tokens",
            "device=cuda",
            *overrides,
            *more,
        ]
    )
    return resolve(recipe, recipe.parallel.cp, origins)


@pytest.mark.parametrize(("length", "parts"), [(65_536, 1), (131_072, 2), (524_288, 5)])
def test_rows_of_a_part_exist_at_a_time(length: int, parts: int) -> None:
    """8 GiB of rows a part. Whole: the norm's input and output, and the router. Of a part: rows, hidden values before
    and after the activation and gates (FP32) of each choice, the shared expert's two, and four gradients of rows."""
    run = _slice(length)
    found = layer(shape(run, run.stages[0]), "E")
    if parts == 1:
        assert found.saved > length * ROW_BYTES
        return
    kept = 2 * 2 * NANO_WIDTH + 4 + 4 * NANO_WIDTH + 29 * EXPERTS + 16 * TOPK
    of_a_part = ROW_BYTES + 4 * TOPK + 2 * 2 * SHARED + 2 * 2 * TOPK * (NANO_WIDTH + EXPERT)
    gradients = length * (2 * NANO_WIDTH + 4 * EXPERTS) + 2 * NANO_WIDTH * EXPERT * EXPERTS
    assert found.saved == pytest.approx(length * kept, rel=1e-3)
    assert found.transient == pytest.approx(-(-length // parts) * of_a_part + gradients, rel=1e-3)


@pytest.mark.parametrize(("length", "cp", "measured_gib"), [(524_288, 1, 88.74), (1_048_576, 2, 81.90)])
def test_a_slice_needs_what_an_h200_measured(length: int, cp: int, measured_gib: float) -> None:
    """Peaks of docs/long_context.md; scan and experts go in parts, every layer is recomputed."""
    run = _slice(length, f"parallel.cp={cp}", "parallel.recompute=full", "data.isolate_documents=false")
    assert memory_plan(run).fullest.total / 2**30 == pytest.approx(measured_gib, rel=0.05)


def test_a_scan_in_parts_needs_less() -> None:
    """208,412 positions are the most that one scan of Nano's groups addresses (tests/unit/model/test_parts.py)."""
    whole, parts = (layer(shape(run, run.stages[0]), "M") for run in (_slice(208_384), _slice(524_288)))
    a_token = [(found.saved + found.transient) / length for found, length in ((whole, 208_384), (parts, 524_288))]
    assert a_token[1] < 0.9 * a_token[0]
