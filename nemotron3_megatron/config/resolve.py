"""A recipe and a world size in, a run out: pure, and nothing is left to decide afterwards."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.legality import check
from nemotron3_megatron.config.parts import is_uniform, part, stage_in_force, world_of
from nemotron3_megatron.config.pipeline import hybrid_layer_pattern
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import data_parallel_size, sequence_parallel
from nemotron3_megatron.config.run import Layout, Origin, Run, Stage
from nemotron3_megatron.config.schedule import lengths, resolve_schedule, resolve_stages


def resolve(recipe: Recipe, world_size: int, origins: Sequence[Origin] = (), step: int = 0) -> Run:
    """Derive every number of a run.

    Args:
        recipe: as composed.
        world_size: ranks of this start.
        origins: where values were set, for messages and for the record; those equal to their default are dropped.
        step: optimizer steps done: the run is resolved for the layout and precision of the stage in force.

    Raises:
        UserError: the recipe cannot run on this many ranks.
    """
    check(recipe, world_size, origins, step)
    return derive(recipe, world_size, origins, step)


def derive(recipe: Recipe, world_size: int, origins: Sequence[Origin] = (), step: int = 0) -> Run:
    """As ``resolve``, of a recipe that is known to be legal on this many ranks."""
    force = stage_in_force(recipe, step)
    own = part(recipe, force, world_size).recipe
    layout, stages = _layout(own, world_size), _stages(recipe, world_size, force)
    all_steps = stages[-1].end_step
    return Run(
        name=recipe.name,
        run_dir=Path(recipe.run_dir or f"runs/{recipe.name}"),
        seed=recipe.seed,
        device=recipe.device,
        total_steps=all_steps if recipe.max_steps is None else min(all_steps, recipe.max_steps),
        model=recipe.model,
        precision=own.precision,
        parallel=own.parallel,
        layout=layout,
        optimizer=recipe.optimizer,
        schedule=resolve_schedule(recipe, stages),
        stages=stages,
        data=recipe.data,
        checkpoint=recipe.checkpoint,
        telemetry=recipe.telemetry,
        resilience=recipe.resilience,
        debug=recipe.debug,
        trainable=recipe.stages[force].trainable,
        gpu=recipe.gpu,
        origins=tuple(origin for origin in origins if origin.value != origin.default),
    )


def check_data(run: Run) -> None:
    """Refuse to train without data; planning needs none.

    Raises:
        UserError: no source, or a tokenizer or token file that does not exist.
    """
    if not run.data.sources:
        raise UserError(
            "data.sources",
            why="is empty: there is nothing to train on",
            nearest="data.sources.NAME.path=PREFIX of a .bin/.idx pair (see python -m data_prep --help)",
        )
    places = {origin.key: origin.place for origin in run.origins}
    for group, sources in {"sources": run.data.sources, "validation": run.data.validation}.items():
        for name, source in sources.items():
            key = f"data.{group}.{name}.path"
            for suffix in (".bin", ".idx"):
                if not Path(source.path + suffix).is_file():
                    raise UserError(
                        f"{key}={source.path}",
                        where=places.get(key),
                        why=f"{source.path}{suffix} does not exist",
                        nearest="make it with python -m data_prep (make quickstart does both)",
                    )


def make_run_dir(run: Run) -> None:
    """Make the run's directory; each rank does, for it may be the first to need it.

    Raises:
        UserError: it cannot be made, or not be written.
    """
    places = {origin.key: origin.place for origin in run.origins}
    why = None
    try:
        run.run_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        why = f"cannot be made: {error.strerror}"
    else:
        if not os.access(run.run_dir, os.W_OK | os.X_OK):
            why = "cannot be written by this user"
    if why:
        raise UserError(f"run_dir={run.run_dir}", where=places.get("run_dir"), why=why, nearest="a directory of yours")


def _stages(recipe: Recipe, world_size: int, force: str) -> tuple[Stage, ...]:
    """All stages; those of a recipe that changes its layout know their own."""
    if is_uniform(recipe):
        dp = data_parallel_size(recipe, world_size)
        return resolve_stages(recipe, dict.fromkeys(recipe.stages, dp))
    own = {name: part(recipe, name, world_of(recipe, name, world_size, force)) for name in recipe.stages}
    layouts = {name: _layout(each.recipe, each.world_size) for name, each in own.items()}
    return tuple(
        replace(
            stage,
            parallel=own[stage.name].recipe.parallel,
            precision=own[stage.name].recipe.precision,
            layout=layouts[stage.name],
            trainable=recipe.stages[stage.name].trainable,
        )
        for stage in resolve_stages(recipe, {name: layout.dp for name, layout in layouts.items()})
    )


def _layout(recipe: Recipe, world_size: int) -> Layout:
    parallel = recipe.parallel
    longest = max(length.seq_length for stage in recipe.stages.values() for length in lengths(stage, 1).values())
    return Layout(
        world_size=world_size,
        tp=parallel.tp,
        pp=parallel.pp,
        vpp=parallel.vpp,
        cp=parallel.cp,
        ep=parallel.ep,
        etp=parallel.etp,
        dp=data_parallel_size(recipe, world_size),
        sequence_parallel=sequence_parallel(recipe),
        hybrid_layer_pattern=hybrid_layer_pattern(recipe.model, parallel.pp * parallel.vpp, longest),
    )
