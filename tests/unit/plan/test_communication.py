"""Bytes of each collective against arithmetic by hand (what really goes over the wire: tests/distributed)."""

from __future__ import annotations

import math

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.communication import communication, dispatched_bytes, groups, latent_reduction
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.plan.segments import segments, weights


def planned(world_size: int, *overrides: str) -> Run:
    """What ``nemotron3 plan`` resolves."""
    recipe, origins = compose(list(overrides))
    return resolve(recipe, world_size, origins)


def sent(run: Run, rank: int = 0) -> dict[tuple[str, str], float]:
    return {(each.what, each.operation): each.bytes for each in communication(run, rank)}


def test_one_rank_sends_nothing() -> None:
    assert communication(planned(1, "recipe=nano_bf16", "parallel=single"), 0) == ()


def test_nano_on_its_published_layout() -> None:
    """TP2 EP32 on 3072 ranks: 2 micro-batches of 8192 tokens; 23 Mamba, 6 attention, 23 MoE layers; hidden 2688."""
    run = planned(3072, "recipe=nano_bf16")
    bytes_of = sent(run)
    activations = 2 * 8192 * 2688 * 2 / 2  # BF16; half of the buffer goes to the other rank
    # 52 layers: forward one gather, backward two; embedding backward; output layer forward.
    assert bytes_of["layers, vocabulary", "all-gather"] == (52 * 3 + 1 + 1) * activations
    assert bytes_of["layers, vocabulary", "reduce-scatter"] == (52 * 2 + 1 + 1) * activations
    rows = 23 * 2 * 8192 // 2 * 6  # sequence parallel: half of the tokens a rank, top-6
    assert bytes_of["expert dispatch", "all-to-all"] == 2 * rows * (2688 * 2 + 4) * 31 / 32
    assert bytes_of["expert combine", "all-to-all"] == 2 * rows * (2688 * 2) * 31 / 32
    experts = 23 * 4 * 2 * 2688 * 1856  # 4 of 128 experts of each layer
    assert bytes_of["expert gradients", "reduce-scatter"] == 4 * experts * 95 / 96
    assert bytes_of["expert parameters", "all-gather"] == 2 * experts * 95 / 96
    duplicated = 53 * 2688 + 23 * 128 * 2688  # norms and routers
    assert bytes_of["gradients of duplicated weights", "all-reduce"] == 4 * duplicated  # 2 * 1/2


@pytest.mark.parametrize(("model", "ratio"), [("nano", 1), ("super", 4), ("ultra", 4)])
def test_latent_width_instead_of_hidden(model: str, ratio: int) -> None:
    run = planned(64, "recipe=nano_bf16", f"model={model}", "parallel=single", "parallel.ep=8")
    assert latent_reduction(run.model) == ratio
    assert dispatched_bytes(run.model, 2) == (
        run.model.hidden_size // ratio * 2 + 4,
        run.model.hidden_size // ratio * 2,
    )


def test_context_parallel_repeats_groups_of_the_scan() -> None:
    """Super at CP16: 8 groups over 16 ranks, so B and C travel twice; keys and values of all 2 groups."""
    run = planned(64, "recipe=super_bf16", "parallel=single", "parallel.cp=16", "parallel.ep=64")
    stage = run.stages[0]
    local = stage.num_microbatches * stage.micro_batch_size * 8192 // 16
    channels = 3 * 8192 + 2 * 16 * 128 + 128
    bytes_of = sent(run)
    assert bytes_of["Mamba sequence to heads and back", "all-to-all"] == 40 * 2 * local * channels * 2 * 15 / 16
    whole = (8 + 2) * local * 16 * 2 * 2 * 128 * 2
    assert bytes_of["attention K, V", "all-gather"] == whole * 15 / 16
    assert bytes_of["attention dK, dV", "all-reduce"] == whole * 2 * 15 / 16


def test_pipeline_sends_each_way_but_at_the_ends() -> None:
    run = planned(64, "recipe=super_bf16", "parallel=single", "parallel.pp=4", "parallel.ep=16")
    stage = run.stages[0]
    activations = stage.num_microbatches * stage.micro_batch_size * 8192 * 4096 * 2
    sends = [sent(run, rank)["activations, gradients", "send"] for rank in range(4)]
    assert sends == [activations, 2 * activations, 2 * activations, activations]
    table = 4 * 131072 * 4096  # the embedding, on both ends for MTP: an all-reduce of two ranks sends it once
    assert [sent(run, rank).get(("embedding of MTP", "all-reduce")) for rank in range(4)] == [table, None, None, table]


def test_recomputed_layers_exchange_again() -> None:
    common = ("recipe=super_bf16",)
    plain = sent(planned(3072, *common))
    again = sent(planned(3072, *common, "parallel.recompute=full"))
    for key in (("expert dispatch", "all-to-all"), ("expert combine", "all-to-all")):
        assert again[key] == 1.5 * plain[key]  # forward, again, backward
    assert again["dense gradients", "reduce-scatter"] == plain["dense gradients", "reduce-scatter"]


def test_without_distributed_optimizer_gradients_are_all_reduced() -> None:
    run = planned(8, "recipe=nano_bf16", "parallel=single", "parallel.distributed_optimizer=false")
    held = weights(run.model, segments(run)[0], run.layout)
    assert sent(run) == {
        ("dense gradients", "all-reduce"): 2 * 7 / 8 * 4 * held.dense,
        ("expert gradients", "all-reduce"): 2 * 7 / 8 * 4 * held.experts,
    }


@pytest.mark.parametrize("recipe", ["nano_bf16", "super_bf16", "ultra_nvfp4"])
@pytest.mark.parametrize("pp", [1, 4])
def test_segments_hold_every_parameter_once(recipe: str, pp: int) -> None:
    """All ranks together: the counts, less routers' biases, and the embedding again where MTP is elsewhere."""
    run = planned(64, f"recipe={recipe}", "parallel=single", f"parallel.pp={pp}")
    held = [weights(run.model, segment, run.layout) for segment in segments(run)]
    counts = count_parameters(run.model)
    moe = run.model.pattern.count("E") + run.model.mtp_pattern.count("E")
    again = run.model.vocab_size * run.model.hidden_size if pp > 1 and run.model.mtp_depths else 0
    expected = counts.total + counts.mtp - moe * run.model.num_moe_experts + again
    assert sum(each.dense + each.experts for each in held) == expected


def test_groups_cover_the_world() -> None:
    every = groups(
        planned(64, "recipe=super_bf16", "parallel=single", "parallel.pp=2", "parallel.tp=2", "parallel.ep=8")
    )
    assert math.prod(every[name].size for name in ("tp", "dp", "pp")) == 64
    assert math.prod(every[name].size for name in ("etp", "ep", "expert_dp", "pp")) == 64
