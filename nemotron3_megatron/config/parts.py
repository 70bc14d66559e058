"""A recipe whose stages differ in layout, precision or trainable parameters, as recipes that do not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from nemotron3_megatron.config.recipe import ParallelConfig, PrecisionConfig, Recipe, StageConfig
from nemotron3_megatron.config.schedule import resolve_stages

_Own = tuple[ParallelConfig | None, PrecisionConfig | None, int | None, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Part:
    """Stages that share layout, precision, world and trainable parameters."""

    recipe: Recipe
    """These stages alone; what was theirs alone is the recipe's."""
    world_size: int
    renamed: tuple[tuple[str, str], ...] = ()
    """Keys of ``recipe`` and what they are called in the whole one."""

    def name(self, key: str) -> str:
        """What a key of ``recipe`` is called in the whole one."""
        for here, there in self.renamed:
            if key == here or key.startswith(f"{here}."):
                return there + key.removeprefix(here)
        return key


def is_uniform(recipe: Recipe) -> bool:
    """Whether no stage has anything of its own that a start is built for."""
    return not any(any(_own(stage)) for stage in recipe.stages.values())


def part(recipe: Recipe, stage: str, world_size: int) -> Part:
    """The part that a stage belongs to."""
    if is_uniform(recipe):
        return Part(recipe, world_size)
    own = _own(recipe.stages[stage])
    stages = {
        name: replace(each, parallel=None, precision=None, world_size=None)
        for name, each in recipe.stages.items()
        if _own(each) == own
    }
    parallel, precision, ranks, _ = own
    alone = replace(
        recipe,
        parallel=parallel or recipe.parallel,
        precision=precision or recipe.precision,
        world_size=ranks or recipe.world_size,
        stages=stages,
    )
    first = next(iter(stages))
    renamed = [(key, f"stages.{first}.{key}") for key, value in zip(_KEYS, own, strict=False) if value is not None]
    return Part(alone, world_size, tuple(renamed))


def parts(recipe: Recipe, world_size: int, step: int) -> Iterator[Part]:
    """The parts that are trained from ``step`` on, the one in force first; ``world_size`` is its own."""
    if not recipe.stages or is_uniform(recipe):
        yield Part(recipe, world_size)
        return
    force = stage_in_force(recipe, step)
    names = list(recipe.stages)
    seen: set[_Own] = set()
    for name in names[names.index(force) :]:
        own = _own(recipe.stages[name])
        if own not in seen:
            seen.add(own)
            yield part(recipe, name, world_of(recipe, name, world_size, force))


def stage_in_force(recipe: Recipe, step: int) -> str:
    """The stage that ``step`` belongs to: by name if the recipe names one (for planning)."""
    if recipe.stage is not None:
        return recipe.stage
    if step == 0:
        return next(iter(recipe.stages))
    stages = resolve_stages(recipe)
    return next((stage.name for stage in stages if step < stage.end_step), stages[-1].name)


def world_of(recipe: Recipe, stage: str, world_size: int, force: str) -> int:
    """Ranks of a stage while ``force`` is trained on ``world_size`` ranks."""
    config = recipe.stages[stage]
    if _own(config) == _own(recipe.stages[force]):
        return world_size
    return config.world_size or recipe.world_size or world_size


def planned_world(recipe: Recipe) -> int:
    """Ranks to plan for: those of the stage that ``stage`` names or the first one, else the recipe's, else one."""
    stage = recipe.stages.get(recipe.stage or next(iter(recipe.stages), ""))
    asked = (stage.world_size if stage else None, recipe.world_size)
    return next((size for size in asked if size is not None), 1)


_KEYS = ("parallel", "precision", "world_size")


def _own(stage: StageConfig) -> _Own:
    return stage.parallel, stage.precision, stage.world_size, stage.trainable
