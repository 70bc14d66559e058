"""Operations by GEMM: against hand arithmetic, and against Megatron-Core's own counter."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from types import SimpleNamespace

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.counts import flops_per_token
from nemotron3_megatron.plan.flops import work_of


def run_of(name: str) -> Run:
    recipe, origins = compose([f"recipe={name}"])
    return resolve(recipe, recipe.world_size or 1, origins)


@pytest.mark.parametrize("name", ["tiny", "nano_bf16", "super_nvfp4", "ultra_nvfp4"])
def test_parts_sum_to_the_operations_of_a_token(name: str) -> None:
    run = run_of(name)
    assert sum(each.flops for each in work_of(run)) == flops_per_token(run.model, run.stages[0].seq_length)


def test_gemms_of_super_by_hand() -> None:
    """Published NVFP4 table: attention, latent projections, MTP and the last 14 layers in BF16, out_proj in MXFP8."""
    run = run_of("super_nvfp4")
    work = {(each.part, each.format, each.direction): each for each in work_of(run)}
    fc1 = work["moe.experts.fc1", "nvfp4", "wgrad"]
    tail = run.model.pattern[-14:]
    assert fc1.calls == 40 - tail.count("E")
    assert fc1.flops == fc1.calls * 2 * 22 * 1024 * 2688  # top-22 experts, latent 1024 to 2688
    assert work["moe.experts.fc1", "bf16", "fprop"].calls == tail.count("E") + 2  # MTP's one block, twice
    assert work["mamba.out_proj", "mxfp8", "dgrad"].flops == (40 - tail.count("M")) * 2 * 8192 * 4096
    assert work["mtp.eh_proj", "bf16", "fprop"].flops == 2 * 2 * (2 * 4096) * 4096  # both depths
    assert work["output", "bf16", "fprop"].flops == 3 * 2 * 4096 * 131072  # main and two depths
    assert work["attention.scores", "bf16", "fprop"].flops == 10 * 2 * 8192 * 32 * 128  # 8 layers and MTP twice


def test_each_direction_has_the_same_operations() -> None:
    totals: Counter[str] = Counter()
    for each in work_of(run_of("nano_nvfp4")):
        totals[each.direction] += each.flops
    assert totals["fprop"] == totals["dgrad"] == totals["wgrad"]


@pytest.mark.parametrize("name", ["super_bf16", "ultra_nvfp4"])
def test_megatron_counts_the_same_but_for_the_projection_of_mtp(name: str) -> None:
    """Its hybrid counter leaves out ``eh_proj`` and takes Mamba's inner width as twice the hidden size (not Nano's)."""
    from megatron.training.training import num_floating_point_operations

    run = run_of(name)
    model = run.model
    arguments = SimpleNamespace(
        **{each.name: getattr(model, each.name) for each in fields(model) if each.name != "ffn_hidden_size"},
        ffn_hidden_size=model.hidden_size,  # of '-' layers: there is none
        seq_length=8192,
        hybrid_layer_pattern=run.layout.hybrid_layer_pattern,
        group_query_attention=True,
        swiglu=False,
        padded_vocab_size=model.vocab_size,
        mtp_num_layers=model.mtp_depths,
        linear_key_head_dim=None,
        linear_value_head_dim=None,
        linear_num_key_heads=None,
        linear_num_value_heads=None,
        linear_conv_kernel_dim=None,
    )
    projection = sum(each.flops for each in work_of(run) if each.part == "mtp.eh_proj")
    assert projection == 3 * 2 * 2 * 2 * model.hidden_size**2
    # Megatron computes in floats; these are whole numbers below 2**53.
    assert num_floating_point_operations(arguments, 1) == 8192 * (flops_per_token(model, 8192) - projection)
