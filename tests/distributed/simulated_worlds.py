"""The official recipes with the layouts that are meant for them, and what the processes that simulate them do.

Worlds that differ in name, schedule and recomputation only hold the same tensors: they are built once.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

from nemotron3_megatron.config import Recipe, Run, compose, planned_world, resolve
from nemotron3_megatron.config.compose import RECIPES
from nemotron3_megatron.plan.simulation import sampled_ranks

NODES: dict[str, int | None] = {
    "parallel=h100x8": 8,
    "parallel=h200x8": 8,
    "parallel=h100x64": 64,
    "parallel=b200x64": 64,
}
"""What people have, for Nano, the ladder and the ablations."""

TOO_LARGE = ("super_bf16", "super_nvfp4", "ultra_nvfp4")
"""Recipes that the layouts of ``NODES`` can lay out but their GPUs cannot hold: Super has files of its own for 64 GPUs,
Ultra needs more."""

LONG_CONTEXT = "stage=long_context"
"""The stage's own layout and world."""

MORE: dict[str, dict[str, int | None]] = {
    "nano_long_context": {LONG_CONTEXT: None},
    "super_long_context": {LONG_CONTEXT: None},
    "ultra_long_context": {LONG_CONTEXT: None},
    "tiny_curriculum": {LONG_CONTEXT: None},
    "lightning_bf16": {"parallel=nano_long_context": 512, **NODES},
    "super_bf16": {"parallel=super_h100x64": 64, "parallel=super_b200x64": 64, "parallel=super_long_context": 256},
    "super_nvfp4": {"parallel=super_h100x64": 64, "parallel=super_b200x64": 64},
    "ultra_nvfp4": {},
    **{f"proxy_{kind}": {"parallel=h100x8": 8, "parallel=h200x8": 8} for kind in ("standard_moe", "latent_moe")},
    **{f"proxy_{kind}": {"parallel=h100x8": 8, "parallel=h200x8": 8} for kind in ("moe", "moe_mtp")},
    **{name: {"parallel=single": 2} for name in ("tiny", "tiny_nvfp4")},
}
"""What a recipe is tried on besides its own layout, and the world's size; recipes not named here: ``NODES``."""


@dataclass(frozen=True, slots=True)
class World:
    """A recipe, what is changed of it, and its ranks (None: as many as it plans for)."""

    recipe: str
    override: str | None = None
    world_size: int | None = None

    def __str__(self) -> str:
        return self.recipe if self.override is None else f"{self.recipe}-{self.override.partition('=')[2]}"

    @property
    def takes_a_step(self) -> bool:
        """On published layouts; on the others the recipe's own world already did."""
        return self.override is None or self.override.endswith("long_context")

    def run(self) -> Run:
        kind, _, _ = (self.override or "").partition("=")
        recipe = composed(f"recipe={self.recipe}", *([self.override] if kind == "stage" and self.override else []))
        if kind == "parallel" and self.override:
            recipe = replace(recipe, parallel=composed("recipe=nano_bf16", self.override).parallel)
        return resolve(recipe, self.world_size or planned_world(recipe))

    @property
    def too_large(self) -> bool:
        """Whether the GPUs that the layout is named after cannot hold the recipe."""
        return self.recipe in TOO_LARGE and self.override in NODES

    @property
    def ranks(self) -> tuple[int, ...]:
        """To simulate; of what no GPU will run, one."""
        sampled = sampled_ranks(self.run().layout)
        return sampled[-1:] if self.too_large else sampled

    def tensors(self) -> str:
        """Equal for worlds that hold the same tensors in the same formats and step alike."""
        run, stepping = self.run(), self.takes_a_step
        parallel = run.parallel if stepping else replace(run.parallel, recompute="none", recompute_modules=())
        batches = tuple(stage.shapes for stage in run.own_stages) if stepping else ()
        return repr((run.model, run.layout, parallel, run.precision, batches))


@lru_cache(maxsize=64)
def composed(*overrides: str) -> Recipe:
    """A third of a second each: recipes and layouts are composed apart."""
    return compose(overrides)[0]


def worlds() -> Iterator[World]:
    """Every official recipe on its own layout and on those meant for it."""
    for path in sorted((RECIPES / "recipe").glob("*.yaml")):
        name = path.stem
        yield World(name)
        for override, size in (MORE.get(name, NODES) | (NODES if name in TOO_LARGE else {})).items():
            yield World(name, override, size)


WORLDS = {str(world): world for world in worlds()}


def apart() -> dict[str, World]:
    """One world for each that differs in what it holds or how it steps."""
    return {world.tensors(): world for world in reversed(WORLDS.values())}


def simulated(worlds: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """This process's share of ``worlds``: reports of sampled ranks, by the world's name.

    In worlds that take a step the last sampled rank of each pipeline stage does.
    """
    from nemotron3_megatron.plan.simulation_rank import simulate

    reports: dict[str, list[dict[str, Any]]] = {}
    for fields in worlds[int(os.environ["RANK"]) :: int(os.environ["WORLD_SIZE"])]:
        world = World(**fields)
        run = world.run()
        ranks = world.ranks
        last = {rank * run.layout.pp // run.layout.world_size: rank for rank in ranks}.values()
        reports[str(world)] = []
        for rank in ranks:
            report = simulate(run, rank, steps=world.takes_a_step and rank in last)
            reports[str(world)].append(asdict(report))
            gc.collect()
    return reports
