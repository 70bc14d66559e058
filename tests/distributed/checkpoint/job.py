"""A small training job for checkpoint tests: the real model, optimizer and step on synthetic tokens."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from tiny import EOD, GLOBAL_BATCH, MICRO_BATCH, SEQ_LENGTH, VOCABULARY, tiny_run

from nemotron3_megatron import platform as platforms
from nemotron3_megatron.checkpoint import adam, content
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.train.optimizer import build_optimizer, wrap_data_parallel
from nemotron3_megatron.train.step import Trainer, configure_schedule, train_step
from nemotron3_megatron.train.updates import MegatronUpdates


@contextmanager
def job(**options: Any) -> Iterator[Trainer]:
    """A trainer for a stack of four layers (``tiny_run(**options)``) on all ranks of this world."""
    defaults = {"stack": "ME|*E", "isolate_documents": False}
    with running(tiny_run(int(os.environ["WORLD_SIZE"]), **(defaults | options))) as trainer:
        yield trainer


@contextmanager
def running(run: Run) -> Iterator[Trainer]:
    """Groups, model and optimizer of a run, until the end of the block (the world itself stays for the next)."""
    platform = platforms.select("cpu")
    groups = start_groups(run, platform, timeout_s=200)
    model = wrap_data_parallel(build_model(run, platform, groups), run, groups)
    optimizer = build_optimizer(model, run, groups)
    trainer = Trainer(run, platform, groups, model, optimizer, MegatronUpdates(optimizer))
    configure_schedule(trainer)
    try:
        yield trainer
    finally:
        parallel_state.destroy_model_parallel()


def train(trainer: Trainer, first: int, last: int) -> list[list[float]]:
    """Steps ``first`` to ``last - 1``; per step the losses of all depths and the gradient norm."""
    history = []
    for step in range(first, last):
        result = train_step(trainer, _batches(trainer, step), trainer.run.stages[0], lr=1e-3 / (1 + 0.1 * step))
        history.append([*result.losses, result.update.grad_norm])
    return history


def tensors(trainer: Trainer) -> dict[str, torch.Tensor]:
    """This rank's weights, moments and counters by checkpoint key (with the shard's offset)."""
    adam.prepare(trainer.optimizer)
    shards = content.sharded(trainer.model, trainer.optimizer)
    apply_factories(shards)
    return {
        f"{item.key}@{item.global_offset}": item.data.detach().clone()
        for item in nested_values(shards)
        if isinstance(item, ShardedTensor)
    }


def stored(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Whole tensors of a checkpoint by key."""
    plain = dist_checkpointing.load_plain_tensors(str(folder / "checkpoints" / f"step_{step:08d}"))
    return {key: value for key, value in plain.items() if isinstance(value, torch.Tensor)}


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Equal keys, dtypes and bits."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


def moved_biases(content: dict[str, torch.Tensor]) -> int:
    """How many of the experts' biases are not zero."""
    return sum(int(value.count_nonzero()) for key, value in content.items() if key.endswith("expert_bias"))


def digest(trainer: Trainer) -> str:
    """Hash of every bit that :func:`tensors` returns."""
    sha = hashlib.sha256()
    for key, tensor in sorted(tensors(trainer).items()):
        sha.update(key.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def steps_of(trainer: Trainer) -> dict[str, Any]:
    """Adam's counters: distinct values, how many there are, and in how many places in memory."""
    steps = [s["step"] for part in adam.parts(trainer.optimizer) for s in part.optimizer.state.values()]
    return {
        "values": sorted({float(step) for step in steps}),
        "count": len(steps),
        "places": len({step.data_ptr() for step in steps}),
    }


def save(trainer: Trainer, folder: Path, step: int, *, keep_last: int | None = None, **state: Any) -> Path:
    """Save into ``folder`` with a small state."""
    state = {"step": step, **state}
    return CheckpointStore(folder).save(step, trainer.chunks, trainer.optimizer, state, keep_last=keep_last)


def load_newest(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """Load the newest checkpoint of ``folder``."""
    store = CheckpointStore(folder)
    path = store.newest()
    assert path is not None
    return store.load(path, trainer.model, trainer.optimizer)


def _batches(trainer: Trainer, step: int) -> list[MicroBatch]:
    """This rank's part of the step's global batch: a noisy permutation chain, the same under every layout."""
    generator = torch.Generator().manual_seed(1000 + step)
    table = torch.randperm(VOCABULARY, generator=torch.Generator().manual_seed(7))
    windows = torch.randint(VOCABULARY, (GLOBAL_BATCH, SEQ_LENGTH + 1), generator=generator)
    for place in range(SEQ_LENGTH):
        windows[:, place + 1] = torch.where(windows[:, place + 1] < 8, windows[:, place + 1], table[windows[:, place]])
    groups = trainer.groups
    mine = windows.chunk(groups.dp.size())[groups.dp.rank()]
    depths = trainer.run.model.mtp_depths
    batches = [
        build_micro_batch(part, mtp_depths=depths, eod_token=EOD, isolate_documents=False)
        for part in mine.split(MICRO_BATCH)
    ]
    return [batch.shard(groups.cp.rank(), groups.cp.size()) for batch in batches]
