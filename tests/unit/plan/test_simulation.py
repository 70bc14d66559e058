"""Simulated worlds: which ranks, what a report says when a rank is not as planned, and the command."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from nemotron3_megatron.cli import main
from nemotron3_megatron.config import Run, UserError, compose, resolve
from nemotron3_megatron.plan import parameters
from nemotron3_megatron.plan.simulation import parse_ranks, sampled_ranks, together
from nemotron3_megatron.plan.simulation_rank import simulate

ROOT = Path(__file__).parents[3]


def tiny(world_size: int, *overrides: str) -> Run:
    recipe, origins = compose(["recipe=tiny", *overrides])
    return resolve(recipe, world_size, origins)


@pytest.mark.parametrize(
    ("world_size", "pp", "ranks"),
    [
        (1, 1, (0,)),
        (6144, 1, (0, 6143)),
        (8, 2, (0, 7)),
        (32, 4, (0, 9, 18, 31)),
        (64, 32, (0, 3, 16, 32, 47, 63)),
    ],
)
def test_sampled_are_the_ends_and_one_in_each_stage(world_size: int, pp: int, ranks: tuple[int, ...]) -> None:
    layout = replace(tiny(2).layout, world_size=world_size, pp=pp)
    assert sampled_ranks(layout) == ranks


def test_ranks_are_numbers_of_the_world() -> None:
    layout = tiny(4).layout
    assert parse_ranks("3, 0,3", layout) == (0, 3)
    for text in ("4", "0,x", "", "-1"):
        with pytest.raises(UserError, match="is not a rank"):
            parse_ranks(text, layout)


def test_pipeline_stages_hold_the_model_together() -> None:
    run = tiny(4, "parallel.pp=2", "parallel.ep=2")
    reports = tuple(simulate(run, rank) for rank in (0, 3))
    assert all(report.is_sound for report in reports), [(r.error, r.differences) for r in reports]
    first, last = reports
    pattern = run.layout.hybrid_layer_pattern.partition("/")[0]
    cut = pattern.index("|")
    assert (first.layers, last.layers) == ((tuple(range(cut)),), (tuple(range(cut, len(pattern) - 1)),))
    experts = run.model.num_moe_experts
    assert (first.experts, last.experts) == ((0, experts // 2 - 1), (experts // 2, experts - 1))
    assert first.step.startswith("2 micro-batches of 4x256 tokens, weights updated")
    assert together(run, reports) == ()
    without = replace(last, linears=last.linears[1:])
    assert last.linears[0] in together(run, (first, without))[0]
    doubled = replace(last, parts=(*last.parts, last.parts[-1]))
    assert together(run, (first, doubled))[0].startswith("parameters of all stages")


def test_a_plan_that_is_wrong_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many rows of linear_qkv where ranks are more than key-value groups, as the plan once had."""
    run = tiny(4, "parallel.tp=4", "parallel.ep=1", "parallel.etp=1", "model.mamba_num_groups=4")
    assert run.model.num_query_groups < 4
    right = parameters.weight_shape

    def repeated(role: str, model: object, tp: int, etp: int) -> tuple[int, int]:
        outputs, inputs = right(role, model, tp, etp)  # type: ignore[arg-type]
        return (outputs + 16 if role == "attention.qkv" else outputs), inputs

    monkeypatch.setattr(parameters, "weight_shape", repeated)
    report = simulate(run, 1, steps=False)
    assert [text.partition(":")[0] for text in report.differences] == ["weights", "gradients", "optimizer"]
    monkeypatch.undo()
    assert simulate(run, 1, steps=False).is_sound


def test_another_model_can_follow_in_the_process() -> None:
    """Megatron-Core's globals get no tensors without values; what only Transformer Engine has is left out."""
    before = MoEAuxLossAutoScaler.main_loss_backward_scale
    assert simulate(tiny(2, "model.moe_router_fusion=true"), 0).is_sound
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is before
    assert not get_moe_metrics_tracker().metrics


def test_an_error_is_reported_with_its_phase() -> None:
    report = simulate(tiny(2, "parallel.moe_token_dispatcher_type=flex"), 0)
    assert report.error.startswith("model: UserError: parallel.moe_token_dispatcher_type=flex")
    assert (list(report.seconds), report.is_sound) == (["groups"], False)


def test_command_simulates_in_processes_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=tiny_nvfp4", "--simulate", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["world_size"], found["is_sound"]) == (2, True)
    assert [report["rank"] for report in found["ranks"]] == [0, 1]
    for report in found["ranks"]:
        assert report["held"] == report["planned"]
        assert "weights updated" in report["step"]


def test_command_refuses_a_rank_outside_the_world(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=tiny", "--ranks", "0,2"]) == 2
    assert "numbers from 0 to 1" in capsys.readouterr().err


def test_only_the_simulating_process_imports_torch() -> None:
    code = "import sys, nemotron3_megatron.plan.simulation_table; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
