"""What the GPU benchmarks train: parts of the official models that fit one GPU, on random tokens."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.platform import Platform, select
from nemotron3_megatron.platform.kernel_cache import use_kernel_cache

use_kernel_cache()  # before Megatron-Core is imported, by whoever imports this first

_SUPER = ("recipe=super_bf16", "model.pattern=MEM*EME", "model.mtp_pattern=''", "model.mtp_depths=0")
SLICES: dict[str, tuple[str, ...]] = {
    "nano": ("recipe=nano_bf16", "model.pattern=MEMEM*EME", "model.num_moe_experts=16"),
    "super": (*_SUPER, "model.num_moe_experts=64"),
    "super512": _SUPER,
    "super128": (*_SUPER, "model.num_moe_experts=128", "model.moe_router_topk=6", "model.moe_latent_size=null"),
    "nano64": ("recipe=nano_bf16", "model.num_moe_experts=64"),
    "a315m": ("recipe=ladder_a315m_1b", "stages.pretrain.micro_batch_size=1"),
}
"""Overrides of each slice: sequence 8192, micro-batches of one sequence, two a GPU unless said otherwise.

Nano's has 1.60 B parameters and 16 of 128 experts, Super's 2.65 B and 64 of 512; the ladder's smallest model is whole.
``super512`` has all 512 experts (10.06 B parameters: two GPUs), ``super128`` standard experts of as many parameters, of
which a token takes 6: as many products as 22 of 512 in a quarter of the width, but for the rounding of 5.5.
``nano64`` has all of Nano's layers and half its experts: on 4 GPUs with EP 4 each holds what it would hold of whole
Nano on 8."""


@dataclass(frozen=True, slots=True)
class Place:
    """A process among ``world_size``, one a GPU."""

    rank: int = 0
    world_size: int = 1
    store: str | None = None
    """File through which the processes find each other."""


def slice_run(name: str, overrides: list[str], world_size: int = 1, sequences: int = 2) -> Run:
    """The run of a slice, with so many sequences a GPU."""
    stages = ("pretrain",) if name == "a315m" else ("phase1", "phase2")
    batch = [f"stages.{stage}.global_batch_size={sequences * world_size}" for stage in stages]
    recipe, origins = compose([*SLICES[name], "parallel=single", *batch, *overrides])
    return resolve(recipe, world_size, origins)


def random_batches(run: Run, step: int, rank: int = 0) -> list[MicroBatch]:
    """One step's micro-batches, the same for the same ``step`` and ``rank`` (of data-parallel ranks)."""
    stage = run.stages[0]
    generator = torch.Generator().manual_seed(1000 * rank + step)
    shape = (stage.micro_batch_size, stage.seq_length + 1)
    return [
        build_micro_batch(
            torch.randint(1, run.model.vocab_size, shape, generator=generator),
            mtp_depths=run.model.mtp_depths,
            eod_token=0,
            isolate_documents=False,
        )
        for _ in range(stage.num_microbatches)
    ]


def in_fresh_process[Result](function: Callable[..., Result], *args: object) -> Result:
    """``function(*args)`` in a process of its own: a trainer leaves memory and Megatron-Core's globals behind."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def on_gpus[Result](world_size: int, function: Callable[..., Result], *args: object) -> list[Result]:
    """``function(*args, place)`` in a process for each of ``world_size`` GPUs; results in the order of ranks."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Place(rank, world_size, f"{folder}/store") for rank in range(world_size)]
        with ProcessPoolExecutor(world_size, multiprocessing.get_context("spawn")) as processes:
            return [done.result() for done in [processes.submit(function, *args, place) for place in places]]


def open_gpu(place: Place) -> Platform:
    """This process's GPU and its world."""
    os.environ["LOCAL_WORLD_SIZE"] = str(place.world_size)
    platform = select("cuda")
    platform.start(local_rank=place.rank)
    # torch.distributed's stores lack type stubs.
    stores: Any = torch.distributed
    store = stores.FileStore(place.store, place.world_size) if place.store else stores.HashStore()
    torch.distributed.init_process_group(
        platform.collective_backend, store=store, rank=place.rank, world_size=place.world_size
    )
    return platform
