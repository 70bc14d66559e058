"""What one simulated rank is made of, and whether the plan says the same.

``python -m nemotron3_megatron.plan.simulation_rank RUN.json RANK REPORT.json`` simulates one rank of a run.
"""

from __future__ import annotations

import json
import re
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from time import monotonic
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import from_json
from nemotron3_megatron.data.batch import build_micro_batch
from nemotron3_megatron.model.builder import build_model, model_sharded_state
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.model.layers import GroupedLinear
from nemotron3_megatron.parallel.simulated import AnswersReads, route_evenly, simulated_world
from nemotron3_megatron.plan.buffers import buffers, optimizer_bytes
from nemotron3_megatron.plan.memory import memory_plan
from nemotron3_megatron.plan.parameters import Chunk, chunk_parameters, chunks
from nemotron3_megatron.plan.simulation import Bytes, Group, Part, RankReport
from nemotron3_megatron.platform.cpu import CpuPlatform
from nemotron3_megatron.precision.lowering import torch as emulated
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.modules import linear_modules
from nemotron3_megatron.precision.verify import differences
from nemotron3_megatron.train.optimizer import build_optimizer, wrap_data_parallel
from nemotron3_megatron.train.step import Trainer, configure_schedule, train_step
from nemotron3_megatron.train.updates import MegatronUpdates

PHASES = ("groups", "model", "precision", "gradients", "optimizer", "step")


def simulate(run: Run, rank: int, *, steps: bool = True) -> RankReport:
    """Build everything that rank ``rank`` of the run holds, and take an optimizer step unless told otherwise.

    The torch spec stands in for Transformer Engine's: the same parameters under the same names.

    Returns:
        What was found; an error of any phase ends the simulation and is part of the report.
    """
    run = replace(run, model=replace(run.model, spec="torch", moe_router_fusion=False))
    report = RankReport(rank=rank, groups={}, seconds={})
    seconds: dict[str, float] = {}
    begun = monotonic()
    try:
        for phase, found in zip(PHASES, _phases(run, rank), strict=False):
            differ = (*report.differences, *found.pop("differences", ()))
            report = replace(report, **found, differences=differ)
            seconds[phase] = round(monotonic() - begun, 3)
            begun = monotonic()
            if phase == PHASES[-2] and not steps:
                break
    except Exception as error:  # whatever stops a rank is what the simulation is for
        phase = PHASES[len(seconds)]
        place = traceback.format_tb(error.__traceback__)[-1].strip()
        report = replace(report, error=f"{phase}: {type(error).__name__}: {error}\n{place}")
    return replace(report, seconds=seconds, peak_bytes=CpuPlatform().peak_memory_bytes())


def _phases(run: Run, rank: int) -> Iterator[dict[str, Any]]:
    """Fields of the report, phase by phase."""
    with simulated_world(run, rank) as (platform, groups):
        mine = chunks(run, groups.pp.rank())
        yield {"groups": _groups(groups), "pipeline_rank": groups.pp.rank()}
        model = build_model(run, platform, groups)
        parts = tuple(_parts(model, groups))
        yield {"parameters": sum(p.numel() for chunk in model for p in chunk.parameters()), "parts": parts} | _layers(
            run, model, mine, groups
        )
        yield _precision(run, model, mine)
        wrapped = wrap_data_parallel(model, run, groups)
        yield {}
        optimizer = build_optimizer(wrapped, run, groups)
        yield _bytes(run, groups, wrapped, optimizer)
        trainer = Trainer(run, platform, groups, wrapped, optimizer, MegatronUpdates(optimizer))
        configure_schedule(trainer)
        yield {"step": _step(trainer)}


def _groups(groups: ProcessGroupCollection) -> dict[str, Group]:
    """Every process group that the rank is in, by Megatron-Core's name."""
    found = {}
    for item in fields(groups):
        group = getattr(groups, item.name, None)
        if isinstance(group, torch.distributed.ProcessGroup):
            ranks = torch.distributed.get_process_group_ranks(group)
            found[item.name] = Group(size=len(ranks), first=ranks[0], last=ranks[-1], place=group.rank())
    return found


def _parts(model: Sequence[Nemotron3Model], groups: ProcessGroupCollection) -> Iterator[Part]:
    """The rank's tensors as checkpoints know them: name, shape here, shape of the whole."""
    names: dict[tuple[Any, ...], Counter[str]] = {}
    for chunk in model:
        sharded = model_sharded_state(chunk, groups)
        apply_factories(sharded)
        for tensor in nested_values(sharded):
            if isinstance(tensor, ShardedTensor):
                kind = re.sub(r"(?<=\.)\d+(?=\.)", "#", tensor.key)
                dtype = str(tensor.dtype).removeprefix("torch.")
                alike = (kind, tuple(tensor.data.shape), tuple(tensor.global_shape), dtype)
                names.setdefault(alike, Counter())[tensor.key] += 1
    for (kind, shape, whole, dtype), keys in names.items():
        yield Part(name=kind, names=len(keys), tensors=keys.total(), shape=shape, whole=whole, dtype=dtype)


def _layers(
    run: Run, model: Sequence[Nemotron3Model], mine: Sequence[Chunk], groups: ProcessGroupCollection
) -> dict[str, Any]:
    """Layers and experts that were built, and where they are not those of the layout."""
    built = tuple(tuple(layer.layer_number - 1 for layer in chunk.decoder.layers) for chunk in model)
    expected = tuple(tuple(range(chunk.start, chunk.start + len(chunk.layers))) for chunk in mine)
    wrong = [] if built == expected else [f"layers: {built} built, {expected} planned"]
    local = {
        tuple(module.token_dispatcher.local_expert_indices)
        for chunk in model
        for module in chunk.modules()
        if hasattr(module, "token_dispatcher")
    }
    count = run.model.num_moe_experts // run.layout.ep
    first = groups.ep.rank() * count
    if local and local != {tuple(range(first, first + count))}:
        wrong.append(f"experts: {sorted(local)} built, {first} to {first + count - 1} planned")
    experts = (first, first + count - 1) if local else None
    return {"layers": built, "experts": experts, "differences": tuple(wrong)}


def _precision(run: Run, model: Sequence[Nemotron3Model], mine: Sequence[Chunk]) -> dict[str, Any]:
    """Install the plan's formats as the torch spec does, and verify them as every start of a training run does."""
    plan = run.precision_plan
    if any(row.format != "bf16" for row in plan.rows):
        emulated.lower(plan, model, torch.default_generator)
    built = [
        (name, emulated.installed_gemms(module)) for chunk in model for name, module in named_linears(chunk).items()
    ]
    wrong = [f"{d.module}: {d.found} installed, {d.planned} planned" for d in differences(plan, built, 0)]
    layers = {index for chunk in mine for index in range(chunk.start, chunk.start + len(chunk.layers))}
    has_mtp = any(chunk.last for chunk in mine)
    expected = {m.name for m in linear_modules(run.model) if (has_mtp if m.layer is None else m.layer in layers)}
    names = [name for name, _ in built]
    if len(names) != len(expected) or set(names) != expected:
        wrong.append(f"linears: {len(names)} built, {len(expected)} planned; {sorted(set(names) ^ expected)}")
    return {"linears": tuple(names), "differences": tuple(wrong)}


def _bytes(
    run: Run, groups: ProcessGroupCollection, wrapped: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> dict[str, Any]:
    """Bytes of the real tensors, and of the memory plan for this very rank."""
    real = [buffer for chunk in wrapped for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    weights = [buffer.param_data for buffer in real if buffer.param_data is not None]
    if not weights:
        weights = [parameter for chunk in wrapped for parameter in chunk.module.parameters()]
    held = Bytes(
        weights=_sum([*weights, *(buffer for chunk in wrapped for buffer in chunk.module.buffers())]),
        gradients=_sum(buffer.grad_data for buffer in real),
        optimizer=sum(_sum(_state(part)) for part in _optimizers(optimizer)),
    )
    stage = memory_plan(run).ranks[groups.pp.rank()]
    place = {False: groups.dp_cp.rank(), True: groups.expt_dp.rank()}
    shares = [
        optimizer_bytes(run, buffer)[place[buffer.expert]]
        for chunk in chunks(run, groups.pp.rank())
        for buffer in buffers(run, chunk_parameters(run, chunk), groups.pp.rank())
    ]
    planned = Bytes(weights=stage.weights, gradients=stage.gradients, optimizer=sum(shares))
    wrong = [
        f"{name}: {there:,} bytes built, {plan:,} planned"
        for name, there in asdict(held).items()
        if there != (plan := getattr(planned, name))
    ]
    if stage.optimizer < held.optimizer:
        wrong.append(f"optimizer: {held.optimizer:,} bytes, more than the fullest rank's {stage.optimizer:,}")
    return {"held": held, "planned": planned, "differences": tuple(wrong)}


def _optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """Those that own parameters: dense and expert parameters have one each."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def _state(part: Any) -> Iterator[torch.Tensor]:
    """Moments, as the first step will make them, and master weights that are not the parameters themselves."""
    part.init_state_fn(part.optimizer, part.config)
    for state in part.optimizer.state.values():
        yield from (state["exp_avg"], state["exp_avg_sq"])
    part.optimizer.state.clear()
    for name in ("shard_fp32_from_float16_groups", "fp32_from_float16_groups"):
        for group in getattr(part, name, []):
            yield from (master for master in group if master is not None)


def _sum(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _step(trainer: Trainer) -> str:
    """One optimizer step: a micro-batch for each pipeline rank, tokens to experts in equal parts.

    Of the batches that this layout trains on, that of the shortest sequences: the scan is a loop over their chunks.
    Experts compute unquantised here: how their quantised rows are padded depends on counts that only a device has.
    """
    run, groups = trainer.run, trainer.groups
    stage = min((shape for stage in run.own_stages for shape in stage.shapes), key=lambda shape: shape.seq_length)
    with torch.device("cpu"):
        windows = torch.zeros(stage.micro_batch_size, stage.seq_length + 1, dtype=torch.int64)
        options = {"mtp_depths": run.model.mtp_depths, "eod_token": run.data.eod_token}
        batch = build_micro_batch(windows, isolate_documents=run.data.isolate_documents, **options)
        mine = batch.shard(groups.cp.rank(), groups.cp.size())
    for module in (module for chunk in trainer.chunks for module in chunk.modules()):
        if isinstance(module, GroupedLinear):
            vars(module).pop("gemm", None)
    route_evenly(trainer.chunks, run.model.moe_router_topk)
    count = min(stage.num_microbatches, run.layout.pp)
    with AnswersReads() as answers:
        result = train_step(trainer, [mine] * count, stage, run.optimizer.lr)
    if not result.update.applied:
        raise RuntimeError("the step was refused")
    tokens = "x".join(map(str, mine.tokens.shape))
    return f"{count} micro-batches of {tokens} tokens, weights updated; {answers.reads} values read"


def main(arguments: Sequence[str]) -> int:
    """Simulate one rank for another process."""
    run, rank, report = arguments
    Path(report).write_text(json.dumps(asdict(simulate(from_json(Path(run).read_text()), int(rank)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
