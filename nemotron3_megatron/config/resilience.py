"""The rules of resilience and of injected faults."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

from nemotron3_megatron.config.fault import IllegalFaultError, parse_faults
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import Rule, Violation


def limits(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Times and limits are sensible, and a rollback has a checkpoint to go back to."""
    options = recipe.resilience
    for item in fields(options):
        value = getattr(options, item.name)
        key = f"resilience.{item.name}"
        if item.name.endswith("_timeout_s") or item.name == "spike_nats":
            if value <= 0:
                yield Violation((key,), "must be positive", f"{key}={item.default:g}")
        elif item.name.endswith("_limit") and value < 0:
            yield Violation((key,), "must not be negative")
    if options.spike_window_steps < 2:
        yield Violation(("resilience.spike_window_steps",), "a median needs at least 2 steps")
    if options.rollback_checkpoints < 1:
        yield Violation(("resilience.rollback_checkpoints",), "must be at least 1")
    if options.straggler_factor <= 1:
        yield Violation(("resilience.straggler_factor",), "must be above 1", "resilience.straggler_factor=1.5")
    if options.straggler == "nvrx" and options.straggler_every is None:
        why = "has no effect with resilience.straggler_every=null"
        yield Violation(("resilience.straggler",), why, "resilience.straggler_every='100 steps'")
    kept = recipe.checkpoint.keep_last
    for key, policy in {"non_finite": options.non_finite, "spike": options.spike}.items():
        if policy != "rollback":
            continue
        if recipe.checkpoint.every is None:
            why = "there is nothing to roll back to without regular checkpoints"
            yield Violation((f"resilience.{key}", "checkpoint.every"), why, "checkpoint.every='100 steps'")
        elif kept is not None and kept < options.rollback_checkpoints:
            why = f"only {kept} checkpoints are kept"
            yield Violation(("resilience.rollback_checkpoints", "checkpoint.keep_last"), why)


def keeping(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """What is to be kept comes to be."""
    checkpoint, data = recipe.checkpoint, recipe.data
    if checkpoint.keep_best and recipe.telemetry.eval_every is None:
        why = "the best have the lowest validation loss, which is never measured"
        yield Violation(("checkpoint.keep_best", "telemetry.eval_every"), why, "telemetry.eval_every='100 steps'")
    elif checkpoint.keep_best and data.sources and not data.validation:
        why = "the best have the lowest validation loss, and data.validation is empty"
        yield Violation(("checkpoint.keep_best",), why, "data.validation.NAME.path=PREFIX or checkpoint.keep_best=0")
    if checkpoint.keep_every is not None and checkpoint.every is None:
        why = "has no effect without regular checkpoints"
        yield Violation(("checkpoint.keep_every", "checkpoint.every"), why, "checkpoint.every='100 steps'")


def intervals(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """In steps or tokens, and positive."""
    every = {
        "telemetry.precision_every": recipe.telemetry.precision_every,
        "telemetry.health_every": recipe.telemetry.health_every,
        "resilience.straggler_every": recipe.resilience.straggler_every,
    }
    for key, duration in every.items():
        if duration is not None and (duration.unit == "seconds" or duration.value <= 0):
            yield Violation((key,), "is a positive number of steps or tokens", f"{key}='100 steps'")


def faults(recipe: Recipe, world_size: int) -> Iterator[Violation]:
    """Faults are legal, on ranks that exist, and asked for twice."""
    debug = recipe.debug
    try:
        parsed = parse_faults(debug.fault)
    except IllegalFaultError as error:
        yield Violation(("debug.fault",), str(error), "debug.fault=kill:rank=1,step=20")
        return
    for fault in parsed:
        if fault.rank >= world_size:
            yield Violation(("debug.fault",), f"rank {fault.rank} is not in a world of {world_size}")
    if parsed and not debug.allow_faults:
        why = "a fault would damage this run, which nobody has said is a test"
        yield Violation(("debug.fault", "debug.allow_faults"), why, "debug.allow_faults=true, or no debug.fault")


RESILIENCE_RULES: tuple[Rule, ...] = (limits, keeping, intervals, faults)
