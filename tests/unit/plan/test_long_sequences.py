"""Experts that take a long sequence in parts, as the plan sees them (``model/moe_parts.py``)."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.activation_shape import shape
from nemotron3_megatron.plan.activations import layer

NANO_WIDTH, EXPERT, SHARED, TOPK, EXPERTS = 2688, 1856, 3712, 6, 16
ROW_BYTES = TOPK * 2 * (NANO_WIDTH + 2 * EXPERT)


def _slice(length: int) -> Run:
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
        ]
    )
    return resolve(recipe, 1, origins)


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
