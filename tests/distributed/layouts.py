"""What ranks do in the layout tests: gradients, losses and initial weights of one world, gathered whole."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import finalize_model_grads
from tiny import EOD, GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH, VOCABULARY, tiny_run

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.model.builder import model_sharded_state
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.step import Trainer, accumulate_gradients, train_step

Arrays = dict[str, np.ndarray[Any, Any]]
ValueOf = Callable[[torch.nn.Parameter], torch.Tensor]


@contextmanager
def started(options: dict[str, Any], make_run: Callable[..., Run] = tiny_run) -> Iterator[Trainer]:
    """A trainer for ``make_run(world, **options)``; groups are torn down afterwards."""
    run = make_run(int(os.environ["WORLD_SIZE"]), **options)
    platform = select(run.device)
    if run.device == "cuda":
        _tune_nothing()
    platform.start(int(os.environ["LOCAL_RANK"]))
    groups = start_groups(run, platform)
    try:
        trainer = build_trainer(run, platform, groups)
        yield trainer
        trainer.release()
    finally:
        stop_groups()


def _tune_nothing() -> None:
    """Triton's tuned kernels take their smallest variant: compiling all, for shapes this small, would take minutes,
    and the first may be too large for FP32."""
    from triton.runtime.autotuner import Autotuner

    def size(config: Any) -> int:
        blocks = [value for value in config.kwargs.values() if isinstance(value, int)]
        return math.prod([*blocks, config.num_stages])

    if not hasattr(Autotuner.prune_configs, "__wrapped__"):
        choose = Autotuner.prune_configs
        Autotuner.prune_configs = wraps(choose)(lambda *args: [min(choose(*args), key=size)])


def batches(trainer: Trainer, step: int) -> list[MicroBatch]:
    """This rank's micro-batches of a fixed global batch with very uneven loss masks: one sequence has no loss."""
    generator = torch.Generator().manual_seed(step)
    windows = torch.randint(1, VOCABULARY, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
    ends = torch.rand(windows.shape, generator=generator) < torch.linspace(0, 0.4, GLOBAL_BATCH)[:, None]
    windows[ends] = EOD
    windows[-1] = EOD
    run, groups = trainer.run, trainer.groups
    micro = [
        build_micro_batch(
            part,
            mtp_depths=run.model.mtp_depths,
            eod_token=EOD,
            isolate_documents=run.data.isolate_documents,
        )
        for part in windows.split(MICRO_BATCH)
    ]
    count = len(micro) // groups.dp.size()
    mine = micro[groups.dp.rank() * count : (groups.dp.rank() + 1) * count]
    return [batch.shard(groups.cp.rank(), groups.cp.size()) for batch in mine]


def measure(folder: str, worlds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """For each named layout: losses of three steps; whole initial weights and gradients of the first step are
    saved to ``folder/<name>_weights.npz`` and ``folder/<name>_gradients.npz``."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for offset, (name, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options) as trainer:
            for kind, arrays in (("weights", _gather(trainer, _weight_of)), ("gradients", _whole_gradients(trainer))):
                if torch.distributed.get_rank() == 0:
                    np.savez(Path(folder) / f"{name}_{kind}.npz", **arrays)  # type: ignore[arg-type]
            results[name] = [_step(trainer, i) for i in range(3)]
    return results


def _step(trainer: Trainer, index: int) -> dict[str, Any]:
    result = train_step(trainer, batches(trainer, index), trainer.run.stages[0], 1e-3)
    return {"losses": result.losses, "grad_norm": result.update.grad_norm, "applied": result.update.applied}


def _whole_gradients(trainer: Trainer) -> Arrays:
    """Gradients of the first batch by global name, reduced over all ranks also with the distributed optimizer."""
    config = trainer.chunks[0].config
    ordinary = config.finalize_model_grads_func

    def reduce_everywhere(model: Any, num_tokens: Any, **options: Any) -> None:
        finalize_model_grads(model, num_tokens, **(options | {"force_all_reduce": True}))

    config.finalize_model_grads_func = reduce_everywhere
    biases = {b: b.clone() for c in trainer.chunks for n, b in c.named_buffers() if n.endswith("expert_bias")}
    accumulate_gradients(trainer, batches(trainer, 0), trainer.run.stages[0])
    config.finalize_model_grads_func = ordinary
    for buffer, before in biases.items():
        buffer.copy_(before)
    return _gather(trainer, _gradient_of)


def _gather(trainer: Trainer, value_of: ValueOf) -> Arrays:
    """Assemble all ranks' shards on rank 0; copies of one shard on several ranks must be equal bit for bit."""
    mine = [shard for chunk in trainer.chunks for shard in _shards(chunk, trainer, value_of)]
    everyone: list[Any] | None = (
        [None] * torch.distributed.get_world_size() if torch.distributed.get_rank() == 0 else None
    )
    torch.distributed.gather_object(mine, everyone)
    whole: Arrays = {}
    filled: Arrays = {}
    for name, shape, offset, values in (shard for rank in everyone or [] for shard in rank):
        target = whole.setdefault(name, np.zeros(shape, np.float32))
        seen = filled.setdefault(name, np.zeros(shape, bool))
        place = tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))
        again = seen[place]
        assert np.array_equal(target[place][again], values[again]), f"copies of {name} differ between ranks"
        target[place], seen[place] = values, True
    assert all(seen.all() for seen in filled.values()), "a part of a parameter is on no rank"
    return whole


def _shards(
    chunk: Nemotron3Model, trainer: Trainer, value_of: ValueOf
) -> list[tuple[str, tuple[int, ...], tuple[int, ...], np.ndarray[Any, Any]]]:
    """Name, global shape, global offset and values of each parameter (or part of one) on this rank."""
    state = model_sharded_state(chunk, trainer.groups)
    apply_factories(state)
    parameters: dict[int, list[torch.nn.Parameter]] = {}
    for parameter in chunk.parameters():
        parameters.setdefault(parameter.untyped_storage().data_ptr(), []).append(parameter)
    shards = []
    for tensor in nested_values(state):
        if isinstance(tensor, ShardedTensor) and "expert_bias" not in tensor.key:
            owner, start = _owner(tensor.data, parameters[tensor.data.untyped_storage().data_ptr()])
            values = value_of(owner).detach().flatten()[start : start + tensor.data.numel()].float().cpu().numpy()
            shape = (*[1] * tensor.prepend_axis_num, *tensor.data.shape)
            shards.append((tensor.key, tensor.global_shape, tensor.global_offset, values.reshape(shape)))
    return shards


def _owner(part: torch.Tensor, candidates: list[torch.nn.Parameter]) -> tuple[torch.nn.Parameter, int]:
    """The parameter that ``part`` (a contiguous run of its elements) lies in, and its first element's index there."""
    for parameter in candidates:
        start = part.storage_offset() - parameter.storage_offset()
        if 0 <= start < parameter.numel():
            return parameter, start
    raise AssertionError("a sharded tensor does not alias a parameter")


def _weight_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    return parameter.data


def _gradient_of(parameter: torch.nn.Parameter) -> torch.Tensor:
    gradient: torch.Tensor = parameter.main_grad  # type: ignore[attr-defined]
    return gradient
