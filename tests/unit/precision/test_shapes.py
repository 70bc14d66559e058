"""Widths against blocks; the widths themselves are compared with built weights in ``test_plan``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron3_megatron.config import UserError, compose
from nemotron3_megatron.precision.parse import parse_policy
from nemotron3_megatron.precision.plan import precision_plan
from nemotron3_megatron.precision.shapes import check_shapes, weight_shape

NVFP4 = parse_policy({"default": "nvfp4"})


@pytest.mark.parametrize(("model", "tp"), [("nano", 1), ("nano", 2), ("super", 2), ("super", 8), ("ultra", 8)])
def test_published_models_fit_nvfp4(model: str, tp: int) -> None:
    config = compose(["recipe=super_bf16", f"model={model}"])[0].model
    check_shapes(precision_plan(NVFP4, config), config, tp)


def test_widths_on_one_of_several_ranks() -> None:
    model = compose(["recipe=super_bf16"])[0].model
    # Figures of the published model: 18560 outputs of in_proj, 2 key-value heads of 128 split over 8 ranks.
    assert weight_shape("mamba.in_proj", model, tp=8) == (2320, 4096)
    assert weight_shape("attention.qkv", model, tp=8) == ((32 * 128 + 2 * 2 * 128) // 8, 4096)
    assert weight_shape("attention.proj", model, tp=8) == (4096, 512)


def test_a_width_that_is_no_whole_number_of_blocks_is_refused() -> None:
    model = compose(["recipe=super_bf16"])[0].model
    narrow = replace(model, moe_ffn_hidden_size=2696)
    with pytest.raises(
        UserError, match=r"decoder.layers.1.mlp.experts.linear_fc1 in nvfp4.*2696 outputs.*16"
    ) as caught:
        check_shapes(precision_plan(NVFP4, narrow), narrow)
    assert caught.value.nearest == "2704 outputs, or a rule {role: moe.experts.fc1, format: bf16}"
    check_shapes(precision_plan(parse_policy({"default": "bf16"}), narrow), narrow)


def test_the_split_counts() -> None:
    model = compose(["recipe=super_bf16"])[0].model
    mxfp8 = precision_plan(parse_policy({"default": "mxfp8"}), model)
    check_shapes(mxfp8, model, tp=1)
    # 18560 / 8 = 2320 = 72.5 blocks of 32.
    with pytest.raises(UserError, match=r"mixer.in_proj in mxfp8.*2320 outputs on each of 8 ranks \(parallel.tp\)"):
        check_shapes(mxfp8, model, tp=8)
    nano = compose(["recipe=nano_bf16"])[0].model
    with pytest.raises(UserError, match=r"mixer.in_proj in nvfp4.*1288 outputs on each of 8 ranks"):
        check_shapes(precision_plan(NVFP4, nano), nano, tp=8)
