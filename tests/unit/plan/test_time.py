"""The estimate: properties that any layout must have, placement by hand, and the published figures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest

from nemotron3_megatron.accelerators import B200, GB200, GPUS, H100
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan import report
from nemotron3_megatron.plan.communication import Collective, Group, Operation, communication
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.published import comparisons
from nemotron3_megatron.plan.roofline import NETWORK_EFFICIENCY, NVLINK_EFFICIENCY, collective_seconds
from nemotron3_megatron.plan.time import estimate


def planned(world_size: int, *overrides: str) -> Run:
    """What ``nemotron3 plan`` resolves."""
    recipe, origins = compose(list(overrides))
    return resolve(recipe, world_size, origins)


def collective(operation: Operation, size: int, stride: int, copies: int = 1) -> Collective:
    group = Group("ep", size, stride)
    return Collective(what="", operation=operation, group=group, per="layer", bytes=1e9, copies=copies)


@pytest.mark.parametrize(
    ("each", "seconds"),
    [
        (collective("all-gather", 8, 1), 1 / (450 * NVLINK_EFFICIENCY)),
        # 2 ranks in each domain of 8: two links out of each domain
        (collective("all-gather", 16, 4), 1 / (2 * 50 * NETWORK_EFFICIENCY)),
        (collective("all-reduce", 4, 8), 1 / (50 * NETWORK_EFFICIENCY)),
        # 8 of 15 others are in other domains
        (collective("all-to-all", 16, 1), 8 / 15 / (50 * NETWORK_EFFICIENCY)),
        # 2 copies over 2 domains meet 1.5 of them: 0.75 of the copies are sent
        (collective("all-to-all", 16, 1, copies=2), 0.75 * 8 / 15 / (50 * NETWORK_EFFICIENCY)),
        (collective("send", 2, 64), 1 / (50 * NETWORK_EFFICIENCY)),
    ],
)
def test_a_gigabyte_by_placement_on_h100(each: Collective, seconds: float) -> None:
    assert collective_seconds(each, H100) == pytest.approx(seconds)


def test_the_parts_of_a_step_and_the_whole_run() -> None:
    run = planned(3072, "recipe=nano_bf16")
    guess = estimate(run, H100)
    parts = (getattr(guess.step, name) for name in type(guess.step).__slots__)
    assert guess.step_seconds == pytest.approx(sum(parts))
    assert guess.tokens_per_second_per_gpu * 3072 * guess.step_seconds == pytest.approx(run.stages[0].tokens_per_step)
    assert guess.days == pytest.approx(run.total_steps * guess.step_seconds / 86400)  # both stages are alike
    assert guess.gpu_hours == pytest.approx(guess.days * 24 * 3072)
    assert 0 < guess.mfu < 1


def test_bubble_shrinks_with_chunks() -> None:
    common = ("recipe=super_bf16", "parallel=single", "parallel.pp=4", "parallel.ep=16")
    plain, interleaved = (planned(64, *common, f"parallel.vpp={vpp}") for vpp in (1, 2))
    step = estimate(plain, GB200).step
    busy = step.linears + step.other + step.layer_communication
    assert step.bubble == pytest.approx(busy * 3 / plain.stages[0].num_microbatches)
    assert estimate(interleaved, GB200).step.bubble < 0.6 * step.bubble


def test_faster_parts_never_slow_a_run() -> None:
    run = planned(3072, "recipe=super_nvfp4")
    seconds = estimate(run, B200).step_seconds
    for part in ("bf16", "fp8", "fp4", "memory_bandwidth", "nvlink_bandwidth", "network_bandwidth", "nvlink_domain"):
        assert estimate(run, replace(B200, **{part: 2 * getattr(B200, part)})).step_seconds <= seconds


def test_emulation_costs_time() -> None:
    bf16, nvfp4 = (planned(3072, f"recipe={name}") for name in ("nano_bf16", "nano_nvfp4"))
    assert estimate(nvfp4, H100).step.linears > estimate(bf16, H100).step.linears
    assert estimate(nvfp4, GB200).step.linears < estimate(bf16, GB200).step.linears


def test_gpu_of_a_plan() -> None:
    assert gpu_of(planned(3072, "recipe=nano_bf16")).name == "h100"
    assert gpu_of(planned(3072, "recipe=super_nvfp4")).name == "gb200"
    assert gpu_of(planned(3072, "recipe=super_nvfp4", "gpu=b200")).name == "b200"


def test_every_gpu_reads_more_than_it_sends() -> None:
    for gpu in GPUS:
        assert gpu.memory_bandwidth > gpu.nvlink_bandwidth > gpu.network_bandwidth
        assert gpu.has_block_scales == (gpu.fp4 is not None)


def test_published_throughputs() -> None:
    """The stated accuracy (docs/planning.md): each figure within 25 %, root mean square within 12 %."""
    errors = [error for _, _, error in comparisons()]
    assert max(map(abs, errors)) < 0.25
    assert (sum(error**2 for error in errors) / len(errors)) ** 0.5 < 0.12


def test_the_plan_as_json_has_bytes_and_time_of_every_pipeline_rank() -> None:
    run = planned(64, "recipe=super_bf16", "parallel=single", "parallel.pp=2", "parallel.ep=8", "gpu=h200")
    plan = json.loads(report.as_json(run))
    for rank in (0, 1):
        rows = [row["bytes"] for row in plan["communication_bytes"] if row["pipeline_rank"] == rank]
        assert rows == [round(each.bytes) for each in communication(run, rank)]
    assert plan["time"]["gpu"] == "h200"
    assert plan["time"]["step"] == asdict(estimate(run, gpu_of(run)).step)
    assert sum(row["flops"] for row in plan["flops"]) == plan["flops_per_token"]
