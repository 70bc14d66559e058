"""Layouts for a number of GPUs: those that are legal and fit, the fastest first.

A search from the best on: every legal layout is ranked by the estimated time of its step without recomputation, which
is the least it can take; memory is planned in that order, and a layout that does not fit is put back with the next
stronger recomputation, whose time is no shorter. The first ones that fit are therefore the fastest ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heapify, heappop, heappush
from itertools import product
from typing import Literal

from nemotron3_megatron.accelerators import Gpu
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.parts import is_uniform, part, stage_in_force
from nemotron3_megatron.config.precision import precision_rules
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.resolve import derive, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.schedule import lengths
from nemotron3_megatron.config.stage_rules import RULES
from nemotron3_megatron.plan.communication import value_bytes
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.memory import GIB, memory_plan
from nemotron3_megatron.plan.memory_advice import OUTSIDE_GIB
from nemotron3_megatron.plan.segments import segments, weights
from nemotron3_megatron.plan.time import Estimate, estimate, rank_time, step_time
from nemotron3_megatron.precision.plan import precision_plan

Recompute = tuple[Literal["none", "selective", "full"], tuple[str, ...]]
RECOMPUTE: tuple[Recompute, ...] = (
    ("none", ()),
    ("selective", ("moe_act", "shared_experts")),
    ("selective", ("moe",)),
    ("full", ()),
)
"""From the least recomputation to the most: a step takes no less time with a later one (``communication.forwards``)."""
MAX_TP, MAX_PP = 16, 32
FEWEST_TOKENS = 1024
"""Of a sequence on a context-parallel rank: below, its GEMMs are too small to be worth the exchange."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What the search sets; everything else is the recipe's."""

    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    micro_batch_size: int = 1
    """Of every stage."""
    recompute: int = 0
    """Index into ``RECOMPUTE``."""

    @property
    def text(self) -> str:
        """Such as ``TP8 PP2x4 EP8``: sizes above 1, chunks of a pipeline rank behind the x."""
        sizes = {"TP": self.tp, "PP": self.pp, "CP": self.cp, "EP": self.ep}
        chunks = f"x{self.vpp}" if self.vpp > 1 else ""
        named = [f"{name}{size}{chunks if name == 'PP' else ''}" for name, size in sizes.items() if size > 1]
        return " ".join(named) or "DP only"

    @property
    def recompute_text(self) -> str:
        """Such as ``moe_act, shared_experts``."""
        mode, modules = RECOMPUTE[self.recompute]
        return ", ".join(modules) or mode


@dataclass(frozen=True, slots=True)
class Found:
    """A layout that is legal and fits."""

    choice: Choice
    memory_gib: float
    """Of the fullest rank."""
    estimate: Estimate


@dataclass(frozen=True, slots=True)
class Suspect:
    """A layout that many would try first, and what speaks against it."""

    choice: Choice
    reason: str


@dataclass(frozen=True, slots=True)
class Search:
    """What a search found."""

    gpu: Gpu
    world_size: int
    limit_gib: float
    """Of the GPU's memory, what torch may use."""
    legal: int
    """Legal layouts with their micro-batches, without regard to recomputation."""
    hopeless: int
    """Those of them whose weights, gradients and optimizer state alone do not fit."""
    planned: int
    """Memory plans made before the best were found."""
    best: tuple[Found, ...]
    """By the time of a step, the fastest first; each layout and micro-batch once, with the least recomputation."""
    suspects: tuple[Suspect, ...]


@dataclass(order=True, slots=True)
class _Candidate:
    seconds: float
    number: int
    choice: Choice = field(compare=False)
    run: Run = field(compare=False)
    exact: bool = field(default=False, compare=False)
    """Whether all pipeline ranks were looked at; else the last one, and ``seconds`` may be too few."""


def search(recipe: Recipe, world_size: int, *, most: int = 10) -> Search:
    """The fastest layouts of a recipe on this many GPUs of its kind.

    Args:
        recipe: its model, precision, batches and options hold; its layout, micro-batches and recomputation do not.
        world_size: GPUs.
        most: layouts returned.

    Raises:
        UserError: no layout is legal.
    """
    if recipe.stages and not is_uniform(recipe):  # the layout is sought for the stages that share one
        recipe = part(recipe, stage_in_force(recipe, 0), world_size).recipe
    runs = list(legal_runs(recipe, world_size))
    # With no legal layout, what the simplest one is refused for.
    gpu = gpu_of(runs[0][1] if runs else resolve(with_choice(recipe, Choice()), world_size))
    limit = (gpu.memory_gib - OUTSIDE_GIB) * GIB
    hopeful = _hopeful(runs, limit)
    heap = [_candidate(choice, run, gpu, number) for number, (choice, run) in enumerate(hopeful)]
    heapify(heap)
    best: list[Found] = []
    planned = 0
    while heap and len(best) < most:
        candidate = heappop(heap)
        if not candidate.exact:
            seconds = step_time(candidate.run, gpu, candidate.run.own_stages[0]).total
            heappush(heap, replace(candidate, seconds=seconds, exact=True))
            continue
        total, planned = memory_plan(candidate.run).fullest.total, planned + 1
        if total <= limit:
            best.append(Found(candidate.choice, total / GIB, estimate(candidate.run, gpu)))
        elif candidate.choice.recompute + 1 < len(RECOMPUTE):
            heappush(heap, _recomputing_more(candidate, gpu))
    fastest = best[0].estimate.step_seconds if best else None
    suspects = tuple(Suspect(each, _reason(recipe, world_size, each, limit, fastest)) for each in _usual(world_size))
    return Search(gpu, world_size, limit / GIB, len(runs), len(runs) - len(hopeful), planned, tuple(best), suspects)


def choices(recipe: Recipe, world_size: int) -> Iterator[Choice]:
    """Every layout and micro-batch worth a thought, legal or not, without recomputation."""
    longest = max(length.seq_length for stage in recipe.stages.values() for length in lengths(stage, 1).values())
    powers = [size for size in (2**power for power in range(world_size.bit_length())) if world_size % size == 0]
    tensor = [size for size in powers if size <= MAX_TP]
    context = [size for size in powers if size == 1 or longest // size >= FEWEST_TOKENS]
    expert = [size for size in _divisors(world_size) if recipe.model.num_moe_experts % size == 0]
    pipeline = [(pp, vpp) for pp in _divisors(world_size) if pp <= MAX_PP for vpp in ((1, 2, 4) if pp > 1 else (1,))]
    for tp, (pp, vpp), cp, ep, size in product(tensor, pipeline, context, expert, (1, 2, 4)):
        if world_size % (tp * pp * cp) == 0 and world_size % (pp * ep) == 0:
            yield Choice(tp=tp, pp=pp, vpp=vpp, cp=cp, ep=ep, micro_batch_size=size)


def legal_runs(recipe: Recipe, world_size: int) -> Iterator[tuple[Choice, Run]]:
    """The choices that no rule refuses, resolved."""
    # As legality.check, which would look for the nearest legal value each time.
    rules = (*RULES, *precision_rules(precision_plan(recipe.precision, recipe.model)))
    for choice in choices(recipe, world_size):
        chosen = with_choice(recipe, choice)
        if not any(True for rule in rules for _ in rule(chosen, world_size)):
            yield choice, derive(chosen, world_size)


def with_choice(recipe: Recipe, choice: Choice) -> Recipe:
    """The recipe in this layout."""
    mode, modules = RECOMPUTE[choice.recompute]
    parallel = replace(
        recipe.parallel,
        tp=choice.tp,
        pp=choice.pp,
        vpp=choice.vpp,
        cp=choice.cp,
        ep=choice.ep,
        etp=1,
        sequence_parallel=None,
        recompute=mode,
        recompute_modules=modules,
    )
    size = choice.micro_batch_size
    stages = {name: replace(stage, micro_batch_size=size) for name, stage in recipe.stages.items()}
    return replace(recipe, parallel=parallel, stages=stages)


def least_bytes(run: Run) -> float:
    """At least so much do weights, gradients and optimizer state take on the fullest rank: no padding, no FP32 weights.

    Dense parameters may be FP32 themselves (routers) and then have two moments and no master: 8 bytes of state.
    """
    layout, value = run.layout, value_bytes(run)
    state = 12 if value == 2 else 8
    sharded = run.parallel.distributed_optimizer
    dense_ranks = layout.dp * layout.cp if sharded else 1
    expert_ranks = layout.world_size // (layout.pp * layout.ep * layout.etp) if sharded else 1
    held = [weights(run.model, segment, layout) for segment in segments(run)]
    return max(
        each.dense * (value + 4 + 8 / dense_ranks) + each.experts * (value + 4 + state / expert_ranks) for each in held
    )


def _recomputing_more(candidate: _Candidate, gpu: Gpu) -> _Candidate:
    choice = replace(candidate.choice, recompute=candidate.choice.recompute + 1)
    mode, modules = RECOMPUTE[choice.recompute]
    parallel = replace(candidate.run.parallel, recompute=mode, recompute_modules=modules)
    run = replace(candidate.run, parallel=parallel)  # recomputation decides nothing else of a run
    return _candidate(choice, run, gpu, candidate.number)


def _candidate(choice: Choice, run: Run, gpu: Gpu, number: int) -> _Candidate:
    """By the last pipeline rank, which has the output layer and MTP; the others are looked at when it matters."""
    return _Candidate(rank_time(run, gpu, run.own_stages[0], run.layout.pp - 1).total, number, choice, run)


def _hopeful(runs: list[tuple[Choice, Run]], limit: float) -> list[tuple[Choice, Run]]:
    """Micro-batches and context parallelism leave weights and their shards as they are."""
    least: dict[tuple[int, ...], float] = {}
    kept = []
    for choice, run in runs:
        key = (choice.tp, choice.pp, choice.vpp, choice.ep)
        if key not in least:
            least[key] = least_bytes(run)
        if least[key] <= limit:
            kept.append((choice, run))
    return kept


def _usual(world_size: int) -> Iterator[Choice]:
    """Within a node, across nodes, and with nothing but data parallelism; nothing recomputed."""
    tried = (
        Choice(),
        Choice(ep=8),
        Choice(tp=8),
        Choice(tp=8, ep=8),
        Choice(tp=2, ep=32),
        Choice(tp=8, ep=64),
        Choice(tp=4, pp=4, ep=8),
        Choice(tp=8, pp=8),
    )
    yield from (each for each in tried if max(each.tp * each.pp, each.ep * each.pp) <= world_size)


def _reason(recipe: Recipe, world_size: int, choice: Choice, limit: float, fastest: float | None) -> str:
    try:
        run = resolve(with_choice(recipe, choice), world_size)
    except UserError as error:
        return f"illegal: {error.what}: {error.why}"  # its place would be the recipe's, not the layout's
    memory = memory_plan(run).fullest
    if memory.total > limit:
        held = memory.weights + memory.gradients + memory.optimizer
        return (
            f"{memory.total / GIB:.1f} GiB, {(memory.total - limit) / GIB:.1f} too many: weights, gradients and"
            f" optimizer {held / GIB:.1f}, activations {memory.activations / GIB:.1f}"
        )
    seconds = estimate(run, gpu_of(run)).step_seconds
    assert fastest is not None  # this one fits, so the search found one
    return f"fits; {seconds:.3g} s a step, {seconds / fastest:.2f} times the best's"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
