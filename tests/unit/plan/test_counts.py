"""Parameter counts against the published checkpoints, and against what Megatron really builds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron3_megatron.config import compose
from nemotron3_megatron.config.sizes import layer_size
from nemotron3_megatron.plan.counts import count_parameters, flops_per_token


@pytest.mark.parametrize(
    ("model", "total", "mtp", "active"),
    [
        # Lightning and Super with MTP: element counts of the released checkpoints (Megatron-Bridge verification
        # cards: 32,913,266,240 and 123,611,033,088); Nano and Ultra: the same arithmetic, by hand.
        ("nano", 31_577_940_288, 0, 3_580_076_352),
        ("lightning", 31_577_940_288, 32_913_266_240 - 31_577_940_288, 3_580_076_352),
        ("super", 120_668_707_840, 123_611_033_088 - 120_668_707_840, 12_770_237_440),
        ("ultra", 549_308_993_536, 11_215_610_368, 56_058_843_136),
    ],
)
def test_published_models_to_the_last_digit(model: str, total: int, mtp: int, active: int) -> None:
    counts = count_parameters(compose(["recipe=nano_bf16", f"model={model}"])[0].model)
    assert (counts.total, counts.mtp, counts.active) == (total, mtp, active)


def test_layers_of_super() -> None:
    model = compose(["recipe=super_bf16"])[0].model
    assert [layer_size(model, kind).total for kind in ("mamba", "attention", "moe")] == [
        109_640_064,
        35_655_680,
        2_873_102_848,
    ]
    layers = count_parameters(model).layers
    assert [layer.index for layer in layers if layer.kind == "attention"] == [7, 16, 25, 36, 47, 58, 69, 78]


def test_unshared_depths_count_each_block() -> None:
    model = compose(["recipe=tiny"])[0].model
    shared = count_parameters(model).mtp
    assert count_parameters(replace(model, mtp_use_repeated_layer=False)).mtp == 2 * shared


def test_flops_are_near_the_published_throughput() -> None:
    """Super on H100, sequences of 4096: 2,969 tokens/s at 248.6 TFLOP/s (Megatron-Bridge card), 83.7 GFLOP a token.

    Ours counts the eh_proj of both MTP depths besides (2 * 3 * 4 * 4096^2 = 0.4 GFLOP), hence within 1 %.
    """
    model = compose(["recipe=super_bf16"])[0].model
    assert flops_per_token(model, 4096) == pytest.approx(248.6e12 / 2969, rel=0.01)
