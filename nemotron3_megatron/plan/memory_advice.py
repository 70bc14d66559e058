"""What would make a run fit a GPU: changes tried by resolving and planning the run again."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations

from nemotron3_megatron.accelerators import GB200, GB300, H100, H200, Gpu
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import Recipe, StageConfig
from nemotron3_megatron.config.resolve import resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.memory import GIB, memory_plan

OUTSIDE_GIB = 4.0
"""Left free: CUDA context, NCCL's buffers, kernels and fragments of the allocator."""


Fields = tuple[tuple[str, object], ...]
"""Fields of ``parallel`` with their new values."""


@dataclass(frozen=True, slots=True)
class Change:
    """Something a user can set, and what it costs compared with the others."""

    text: str
    """As on the command line."""
    cost: float
    """Of a step's time, roughly: a forward pass is a third of it, parallelism adds communication."""
    kind: str
    """Of two changes of one kind only one makes sense."""
    parallel: Fields = ()
    micro_batch_size: int | None = None


@dataclass(frozen=True, slots=True)
class Advice:
    """For one GPU."""

    gpu: Gpu
    limit_gib: float
    """Of the GPU's memory, what torch may use."""
    changes: tuple[Change, ...] | None
    """The cheapest that fit; empty: it fits as it is; None: none of those tried does."""
    total_gib: float | None
    """With the changes."""


def advise(run: Run) -> tuple[Advice, ...]:
    """For the GPU that the run is planned for and the usual others, from the smallest on.

    Each is planned with its own backend: what is native on one is emulated on another, and takes more.
    """
    gpus = {gpu.name: gpu for gpu in (gpu_of(run), H100, H200, GB200, GB300)}.values()
    totals = {gpu.has_block_scales: _Totals(replace(run, gpu=gpu.name)) for gpu in gpus}
    ordered = sorted(gpus, key=lambda gpu: gpu.memory_gib)
    return tuple(_advice(gpu, totals[gpu.has_block_scales]) for gpu in ordered)


class _Totals:
    """Candidates from the cheapest to the dearest with their memory, planned when asked for and once."""

    def __init__(self, run: Run) -> None:
        self._seen: list[tuple[tuple[Change, ...], float]] = [((), memory_plan(run).fullest.total / GIB)]
        self._rest = _planned(run)

    def __iter__(self) -> Iterator[tuple[tuple[Change, ...], float]]:
        yield from self._seen
        for found in self._rest:
            self._seen.append(found)
            yield found


def _advice(gpu: Gpu, totals: Iterable[tuple[tuple[Change, ...], float]]) -> Advice:
    limit = gpu.memory_gib - OUTSIDE_GIB
    for changed, total in totals:
        if total <= limit:
            return Advice(gpu, limit, changed, total)
    return Advice(gpu, limit, None, None)


def _planned(run: Run) -> Iterator[tuple[tuple[Change, ...], float]]:
    recipe = _recipe_of(run)
    for changed in _candidates(run):
        try:
            tried = resolve(_with(recipe, changed), run.layout.world_size)
        except UserError:
            continue  # illegal on this many ranks
        yield changed, memory_plan(tried).fullest.total / GIB


def _candidates(run: Run) -> list[tuple[Change, ...]]:
    """Single changes and pairs, the cheapest first."""
    single = list(_changes(run))
    chosen: list[tuple[Change, ...]] = [(change,) for change in single]
    chosen += [pair for pair in combinations(single, 2) if pair[0].kind != pair[1].kind]
    return sorted(chosen, key=lambda changes: sum(change.cost for change in changes))


def _changes(run: Run) -> Iterator[Change]:
    layout, parallel = run.layout, run.parallel
    if not parallel.distributed_optimizer:
        sharded: Fields = (("distributed_optimizer", True),)
        yield Change("parallel.distributed_optimizer=true", 0.0, "optimizer", sharded)
    if parallel.recompute == "none":
        for modules, cost in ((("moe_act", "shared_experts"), 0.02), (("moe",), 0.15)):
            fields: Fields = (("recompute", "selective"), ("recompute_modules", modules))
            text = f"parallel.recompute=selective parallel.recompute_modules=[{','.join(modules)}]"
            yield Change(text, cost, "recompute", fields)
    if parallel.recompute != "full":
        fields = (("recompute", "full"), ("recompute_modules", ()))
        text = "parallel.recompute=full" + (" parallel.recompute_modules=[]" if parallel.recompute_modules else "")
        yield Change(text, 0.33, "recompute", fields)
    largest = max(stage.micro_batch_size for stage in run.own_stages)
    if largest > 1:
        text = " ".join(f"stages.{stage.name}.micro_batch_size=1" for stage in run.own_stages)
        yield Change(text, 0.05, "batch", micro_batch_size=1)
    for factor, cost in ((2, 0.04), (4, 0.1), (8, 0.2)):
        for name, weight in (("ep", 1.0), ("tp", 2.0), ("pp", 1.5)):
            size = getattr(layout, name) * factor
            yield Change(f"parallel.{name}={size}", weight * cost, name, ((name, size),))


def _with(recipe: Recipe, changed: tuple[Change, ...]) -> Recipe:
    fields = dict(field for change in changed for field in change.parallel)
    parallel = replace(recipe.parallel, **fields)  # type: ignore[arg-type]
    sizes = [change.micro_batch_size for change in changed if change.micro_batch_size is not None]
    stages = recipe.stages
    if sizes:
        stages = {name: replace(stage, micro_batch_size=sizes[0]) for name, stage in stages.items()}
    return replace(recipe, parallel=parallel, stages=stages)


def _recipe_of(run: Run) -> Recipe:
    """A recipe that resolves to ``run``, with durations in steps."""
    stages = {
        stage.name: StageConfig(
            tokens=Duration(stage.steps, "steps"),
            seq_length=stage.seq_length,
            global_batch_size=stage.global_batch_size,
            micro_batch_size=stage.micro_batch_size,
        )
        for stage in run.own_stages
    }
    return Recipe(
        name=run.name,
        model=run.model,
        precision=run.precision,
        parallel=run.parallel,
        optimizer=run.optimizer,
        stages=stages,
        data=run.data,
        checkpoint=run.checkpoint,
        telemetry=run.telemetry,
        device=run.device,
        gpu=run.gpu,
    )
