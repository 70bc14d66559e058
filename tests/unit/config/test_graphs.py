"""When forward and backward become a CUDA graph, and what is said when they do not."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.graphs import why_no_graph
from nemotron3_megatron.config.run import Run

LADDER = ("recipe=ladder_a315m_1b", "parallel=single", "stages.pretrain.global_batch_size=8")


def run_of(*overrides: str, world_size: int = 1) -> Run:
    recipe, origins = compose([*LADDER, f"world_size={world_size}", *overrides])
    return resolve(recipe, world_size, origins)


def test_one_gpu_has_a_graph_by_itself() -> None:
    assert why_no_graph(run_of(), spec="te", backend="none") == ""


def test_several_gpus_must_ask() -> None:
    run = run_of(world_size=2)
    assert "several GPUs" in why_no_graph(run, spec="te", backend="none")
    asked = run_of("parallel.cuda_graph=passes", world_size=2)
    assert why_no_graph(asked, spec="te", backend="none") == ""


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("parallel.cuda_graph=none", "parallel.cuda_graph=none"),
        ("precision.dtype=fp32", "precision.dtype=fp32"),
        ("data.isolate_documents=false", "isolated documents"),
        ("stages.pretrain.other_lengths={short: {seq_length: 4096, share: 0.5}}", "differ in their shapes"),
    ],
)
def test_each_obstacle_is_named(override: str, reason: str) -> None:
    assert reason in why_no_graph(run_of(override), spec="te", backend="none")


def test_modules_and_quantisation_count() -> None:
    assert "torch spec" in why_no_graph(run_of(), spec="torch", backend="none")
    recipe, origins = compose(["recipe=tiny_nvfp4", "precision.dtype=bf16", "parallel=single", "world_size=1"])
    quantised = resolve(recipe, 1, origins)
    assert "random numbers" in why_no_graph(quantised, spec="te", backend="emulated")
    assert "token counts" in why_no_graph(quantised, spec="te", backend="native")
    faulty = run_of("debug.fault=nan:rank=0,step=2", "debug.allow_faults=true")
    assert "debug.fault" in why_no_graph(faulty, spec="te", backend="none")


def test_experts_on_other_ranks_are_reached_by_collectives() -> None:
    asked = ("parallel.ep=2", "parallel.cuda_graph=passes")
    assert "alltoall" in why_no_graph(run_of(*asked, world_size=2), spec="te", backend="none")
    gathering = run_of(*asked, "parallel.moe_token_dispatcher_type=allgather", world_size=2)
    assert why_no_graph(gathering, spec="te", backend="none") == ""
    assert "collectives" in why_no_graph(run_of("parallel.tp=2", *asked[1:], world_size=2), spec="te", backend="none")


def test_what_ddp_moves_beside_the_passes_is_part_of_the_graph() -> None:
    overlapped = ("parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true")
    run = run_of(*overlapped, "parallel.cuda_graph=passes", world_size=2)
    assert why_no_graph(run, spec="te", backend="none") == ""
