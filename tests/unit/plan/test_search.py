"""The search for layouts, against every layout of a small world tried one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import product

import pytest

from nemotron3_megatron.accelerators import H200
from nemotron3_megatron.cli import main
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.plan.memory import GIB, memory_plan
from nemotron3_megatron.plan.search import RECOMPUTE, least_bytes, legal_runs, search, with_choice
from nemotron3_megatron.plan.search_table import overrides
from nemotron3_megatron.plan.time import estimate

LIMIT_GIB = 141e9 / GIB - 4
"""The data sheet's 141 GB, less what lies outside torch's allocator."""


def nano(*overrides: str) -> Recipe:
    return compose(["recipe=nano_bf16", "gpu=h200", *overrides])[0]


def exhaustive(recipe: Recipe, world_size: int) -> list[float]:
    """Seconds of a step of everything that resolves and fits, from plain loops; one recomputation a layout."""
    numbers = [size for size in range(1, world_size + 1) if world_size % size == 0]
    seconds = []
    for tp, pp, vpp, cp, ep, size in product(numbers, numbers, (1, 2, 4), numbers, numbers, (1, 2, 4)):
        if world_size % (tp * pp * cp) or world_size % (pp * ep) or (pp == 1 < vpp):
            continue  # refused anyway, but slowly
        fitting = []
        for mode, modules in RECOMPUTE:
            parallel = replace(recipe.parallel, tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, etp=1, recompute=mode)
            parallel = replace(parallel, recompute_modules=modules)
            stages = {name: replace(stage, micro_batch_size=size) for name, stage in recipe.stages.items()}
            try:
                run = resolve(replace(recipe, parallel=parallel, stages=stages), world_size)
            except UserError:
                continue
            if memory_plan(run).fullest.total / GIB <= LIMIT_GIB:
                fitting.append(estimate(run, H200).step_seconds)
        seconds += [min(fitting)] if fitting else []
    return sorted(seconds)


def test_the_best_of_a_small_world_are_those_of_trying_everything() -> None:
    found = search(nano(), 4, most=6)
    fastest = [each.estimate.step_seconds for each in found.best]
    assert fastest == pytest.approx(exhaustive(nano(), 4)[:6])


def test_what_is_found_is_legal_fits_and_is_sorted() -> None:
    recipe = nano()
    found = search(recipe, 16)
    assert len(found.best) == len({each.choice for each in found.best}) == 10
    for each in found.best:
        run = resolve(with_choice(recipe, each.choice), 16)
        assert memory_plan(run).fullest.total / GIB == pytest.approx(each.memory_gib)
        assert each.memory_gib <= LIMIT_GIB
    seconds = [each.estimate.step_seconds for each in found.best]
    assert seconds == sorted(seconds)


def test_what_is_pruned_by_weights_never_fits() -> None:
    for _, run in list(legal_runs(nano(), 8))[::7]:
        held = [each.weights + each.gradients + each.optimizer for each in memory_plan(run).ranks]
        assert 0.8 * max(held) < least_bytes(run) <= max(held)


def test_suspects_are_refused_by_memory_or_by_a_rule() -> None:
    reasons = {each.choice.text: each.reason for each in search(nano(), 8, most=1).suspects}
    assert "too many: weights, gradients and optimizer" in reasons["DP only"]
    assert reasons["TP8 EP8"].startswith("fits; ")
    few = nano("stages.phase1.global_batch_size=4", "stages.phase2.global_batch_size=4")
    refused = {each.choice.text: each.reason for each in search(few, 8, most=1).suspects}
    assert refused["DP only"].startswith("illegal: stages.phase1.global_batch_size=4")


def test_nothing_legal_is_the_users_error() -> None:
    with pytest.raises(UserError, match="37 data-parallel ranks"):
        search(nano(), 37)


def test_the_command_prints_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "recipe=nano_bf16", "gpus=8", "gpu=h200", "--search", "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["gpu"], data["world_size"], len(data["best"])) == ("h200", 8, 10)
    recipe, _ = compose(["recipe=nano_bf16", "gpu=h200", *data["best"][0]["overrides"].split()])
    run = resolve(recipe, 8)
    assert memory_plan(run).fullest.total / GIB == pytest.approx(data["best"][0]["memory_gib"])


def test_overrides_name_every_stage() -> None:
    recipe = nano()
    text = overrides(recipe, next(legal_runs(recipe, 8))[0])
    assert "stages.phase1.micro_batch_size=1 stages.phase2.micro_batch_size=1" in text


def test_recomputation_is_the_least_that_fits() -> None:
    recipe, _ = compose(["recipe=nano_bf16", "gpu=h100"])
    found = [each.choice for each in search(recipe, 8).best]
    assert {each.recompute for each in found} >= {1, 3}
    for choice in (each for each in found if each.recompute):
        less = resolve(with_choice(recipe, replace(choice, recompute=choice.recompute - 1)), 8)
        assert memory_plan(less).fullest.total / GIB > 80e9 / GIB - 4
