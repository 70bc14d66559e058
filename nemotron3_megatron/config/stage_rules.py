"""The rules of stages: sequence lengths, batches, blends, durations and the schedule; and ``RULES``, all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from nemotron3_megatron.config.device_rules import device
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.ranges import ranges, real_numbers
from nemotron3_megatron.config.recipe import LengthConfig, Recipe, StageConfig
from nemotron3_megatron.config.rules import (
    Rule,
    Violation,
    data_parallel_size,
    experts,
    mamba,
    options,
    pattern,
    pipeline,
    sequence_parallel,
    tensor_parallel,
    world,
)
from nemotron3_megatron.config.schedule import batch_sizes, lengths, resolve_schedule, resolve_stages


def curriculum(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Stages, their sequence lengths and their batches, whatever the layout."""
    if not recipe.stages:
        yield Violation(
            ("stages",),
            "a run has at least one stage",
            "stages.main={tokens: 1M tokens, seq_length: 256, global_batch_size: 16}",
        )
    if recipe.stage is not None and recipe.stage not in recipe.stages:
        yield Violation(("stage",), f"is none of {', '.join(recipe.stages)}", f"stage={[*recipe.stages, ''][0]}")
    for name, stage in recipe.stages.items():
        yield from _stage(f"stages.{name}", stage)
        for key, blend in _blends(f"stages.{name}", stage):
            if blend is not None and blend not in recipe.data.blends:
                why = f"data.blends has no {blend}" + (
                    f"; it has {', '.join(recipe.data.blends)}" * bool(recipe.data.blends)
                )
                yield Violation((key,), why, f"{key}=null or data.blends.{blend}={{NAME: WEIGHT}}")


def _stage(key: str, stage: StageConfig) -> Iterator[Violation]:
    sizes: dict[str, int | None] = {
        f"{key}.{name}": getattr(stage, name) for name in ("seq_length", "micro_batch_size")
    }
    for name in ("global_batch_size", "batch_tokens", "world_size"):
        sizes[f"{key}.{name}"] = getattr(stage, name)
    for name, other in stage.other_lengths.items():
        for field in ("seq_length", "micro_batch_size", "batch_tokens"):
            sizes[f"{key}.other_lengths.{name}.{field}"] = getattr(other, field)
    wrong = [Violation((name,), "must be at least 1") for name, size in sizes.items() if size is not None and size < 1]
    yield from wrong
    if (stage.global_batch_size is None) == (stage.batch_tokens is None):
        why = "a stage's batch is either of sequences (global_batch_size) or of tokens (batch_tokens)"
        yield Violation((f"{key}.global_batch_size",), why, f"{key}.batch_tokens=null")
        return
    if wrong:
        return
    for pattern_text in stage.trainable:
        try:
            re.compile(pattern_text)
        except re.error as error:
            why = f"{pattern_text} is no regular expression: {error}"
            yield Violation((f"{key}.trainable",), why, f"{key}.trainable=[router, '^mtp']")
    if stage.lr is not None and stage.lr < 0:
        yield Violation((f"{key}.lr",), "must not be negative", f"{key}.lr=null")
    shares = [other.share for other in stage.other_lengths.values()]
    for name, other in stage.other_lengths.items():
        if not 0 < other.share < 1 or round(sum(shares), 9) >= 1 or round(other.share, 3) != other.share:
            why = "a part of the steps, in thousandths; all together leave some for the stage's own seq_length"
            yield Violation((f"{key}.other_lengths.{name}.share",), why, f"{key}.other_lengths.{name}.share=0.08")
    rampup = stage.batch_rampup
    if rampup is None:
        return
    full = stage.batch_tokens or (stage.global_batch_size or 0) * stage.seq_length
    if rampup.increment_tokens < 1 or not 0 < rampup.start_tokens < full:
        why = f"a batch grows in positive increments to the stage's {full:,} tokens"
        yield Violation(
            (f"{key}.batch_rampup.start_tokens", f"{key}.batch_rampup.increment_tokens"),
            why,
            f"{key}.batch_rampup=null",
        )
    elif (full - rampup.start_tokens) % rampup.increment_tokens:
        why = f"increments of {rampup.increment_tokens:,} do not lead from {rampup.start_tokens:,} to {full:,} tokens"
        yield Violation(
            (f"{key}.batch_rampup.increment_tokens",),
            why,
            f"{key}.batch_rampup.increment_tokens={full - rampup.start_tokens}",
        )


def blends(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Blends are of sources and other blends that exist, and never of themselves."""
    data = recipe.data
    for name, weights in data.blends.items():
        if not weights:
            yield Violation((f"data.blends.{name}",), "is empty", f"~data.blends.{name}")
        if name in data.sources:
            yield Violation((f"data.blends.{name}",), "a source has the same name", f"data.blends.{name}_blend")
        for part, weight in weights.items():
            key = f"data.blends.{name}.{part}"
            if part not in data.sources and part not in data.blends:
                yield Violation((key,), f"is neither a source nor a blend: {part}", f"data.sources.{part}.path=PREFIX")
            elif weight <= 0:
                yield Violation((key,), "must be positive", f"~{key}")
            elif name in _parts_of(data.blends, part):
                yield Violation((key,), f"the blend {name} would be a part of itself", f"~{key}")


def _parts_of(blends: Mapping[str, Mapping[str, float]], name: str) -> set[str]:
    """A source or blend, and all that it is made of."""
    found, waiting = set[str](), [name]
    while waiting:
        if (each := waiting.pop()) not in found:
            found.add(each)
            waiting += blends.get(each, {})
    return found


def _blends(key: str, stage: StageConfig) -> Iterator[tuple[str, str | None]]:
    yield f"{key}.blend", stage.blend
    for name, other in stage.other_lengths.items():
        yield f"{key}.other_lengths.{name}.blend", other.blend


def batches(recipe: Recipe, world_size: int) -> Iterator[Violation]:
    """Sequence lengths and batches of each stage against the layout."""
    dp = data_parallel_size(recipe, world_size)
    for name, stage in recipe.stages.items():
        *growing, full = batch_sizes(stage)
        for size in (full, *growing):
            for other, length in lengths(stage, size).items():
                for found in _batch(recipe, f"stages.{name}", other, length, dp):
                    yield found if size == full else _while_growing(found, f"stages.{name}.batch_rampup", size)


def _while_growing(found: Violation, key: str, size: int) -> Violation:
    """Of a batch that is all right once it has grown."""
    keys = (f"{key}.start_tokens", f"{key}.increment_tokens")
    return Violation(keys, f"{found.why}, while the batch is of {size:,} tokens", f"{key}=null")


def _batch(recipe: Recipe, key: str, other: str, length: LengthConfig, dp: int) -> Iterator[Violation]:
    """One sequence length of a stage, with one size of its batch."""
    parallel, tokens = recipe.parallel, length.batch_tokens or 0
    stage = recipe.stages[key.removeprefix("stages.")]
    here = f"{key}.other_lengths.{other}" if other else key
    batch = f"{key}.global_batch_size" if stage.global_batch_size is not None else f"{key}.batch_tokens"
    if other and stage.other_lengths[other].batch_tokens is not None:
        batch = f"{here}.batch_tokens"
    seq_length, ranks = f"{here}.seq_length", parallel.tp * parallel.cp
    if parallel.cp > 1 and length.seq_length % (2 * parallel.cp):
        why = f"context parallelism cuts a sequence into 2*cp = {2 * parallel.cp} chunks"
        yield Violation((seq_length, "parallel.cp"), why)
    if sequence_parallel(recipe) and length.seq_length % ranks:
        yield Violation((seq_length, "parallel.tp"), f"sequence parallelism splits it over tp*cp = {ranks} ranks")
    if tokens % length.seq_length:
        why = f"a batch of {tokens:,} tokens is no whole number of sequences of {length.seq_length:,}"
        nearest = max(tokens // length.seq_length, 1) * length.seq_length
        yield Violation((seq_length, batch), why, f"{batch}={nearest}" if batch.endswith("tokens") else None)
        return
    sequences, together = tokens // length.seq_length, length.micro_batch_size * dp
    if sequences % together:
        why = (
            f"{sequences} sequences cannot be dealt in micro-batches of {length.micro_batch_size}"
            f" to {dp} data-parallel ranks"
        )
        yield Violation((batch, f"{here}.micro_batch_size", "world_size"), why)
    elif parallel.vpp > 1 and sequences // together % parallel.pp:
        why = f"interleaving needs micro-batches ({sequences // together}) in multiples of pp={parallel.pp}"
        yield Violation((batch, "parallel.pp"), why)


def durations(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Durations are positive and not in wall-clock time."""
    optional: dict[str, Duration | None] = {
        **{f"stages.{name}.tokens": stage.tokens for name, stage in recipe.stages.items()},
        **{
            f"stages.{name}.batch_rampup.over": stage.batch_rampup.over
            for name, stage in recipe.stages.items()
            if stage.batch_rampup is not None
        },
        "checkpoint.every": recipe.checkpoint.every,
        "checkpoint.keep_every": recipe.checkpoint.keep_every,
        "telemetry.log_every": recipe.telemetry.log_every,
        "telemetry.eval_every": recipe.telemetry.eval_every,
        "optimizer.lr_decay": recipe.optimizer.lr_decay,
        "optimizer.lr_wsd_decay": recipe.optimizer.lr_wsd_decay,
        "optimizer.lr_warmup": recipe.optimizer.lr_warmup,
    }
    for key, duration in optional.items():
        if duration is None:
            continue
        if duration.unit == "seconds":
            yield Violation((key,), "is a wall-clock time; count it in steps or tokens", f"{key}='100 steps'")
        elif duration.value <= 0 and key != "optimizer.lr_warmup":
            yield Violation((key,), "must be positive", f"{key}='100 steps'")
    wsd = recipe.optimizer.lr_decay_style == "WSD"
    if wsd and recipe.optimizer.lr_wsd_decay is None:
        yield Violation(
            ("optimizer.lr_wsd_decay",),
            "WSD needs the length of its decay tail",
            "optimizer.lr_wsd_decay='500 steps' or optimizer.lr_decay_style=cosine",
        )
    if not wsd and recipe.optimizer.lr_wsd_decay is not None:
        yield Violation(
            ("optimizer.lr_wsd_decay",),
            f"has no effect with {recipe.optimizer.lr_decay_style} decay",
            "optimizer.lr_wsd_decay=null",
        )


def schedule(recipe: Recipe, _world_size: int) -> Iterator[Violation]:
    """Warmup and decay tail fit before the end of the decay, if any stage follows the schedule."""
    if all(stage.lr is not None for stage in recipe.stages.values()):
        return
    shape = resolve_schedule(recipe, resolve_stages(recipe))
    used = shape.warmup_tokens + shape.wsd_decay_tokens
    if used > shape.decay_end_tokens:
        why = (
            f"warmup of {shape.warmup_tokens:,} and decay tail of {shape.wsd_decay_tokens:,} tokens do not fit"
            f" into the {shape.decay_end_tokens:,} tokens before the decay ends"
        )
        if recipe.optimizer.lr_decay is not None:
            keys = ("optimizer.lr_decay", "optimizer.lr_warmup", "optimizer.lr_wsd_decay")
            yield Violation(keys, why, f"optimizer.lr_decay='{used} tokens'")
        tail, end = shape.wsd_decay_tokens, shape.decay_end_tokens
        if tail <= end:
            yield Violation(("optimizer.lr_warmup",), why, f"optimizer.lr_warmup='{end - tail} tokens'")
        yield Violation(
            ("optimizer.lr_wsd_decay",), why, f"optimizer.lr_wsd_decay='{max(end - shape.warmup_tokens, 1)} tokens'"
        )


CURRICULUM_RULES: tuple[Rule, ...] = (ranges, real_numbers, blends, curriculum)
LAYOUT_RULES: tuple[Rule, ...] = (
    *CURRICULUM_RULES,
    pattern,
    experts,
    tensor_parallel,
    mamba,
    world,
    pipeline,
    options,
    device,
    batches,
)
"""Those that hold or not for each layout of a recipe; they look at nothing that spans stages."""
SCHEDULE_RULES: tuple[Rule, ...] = (durations, schedule)
"""Those of all stages together."""
RULES: tuple[Rule, ...] = (*LAYOUT_RULES, *SCHEDULE_RULES)
