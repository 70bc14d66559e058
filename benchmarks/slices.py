"""What the GPU benchmarks train: parts of the official models that fit one GPU, on random tokens."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor

import torch

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.platform import Platform, select

_ONE_STAGE = ("stages.phase1.global_batch_size=2", "stages.phase2.global_batch_size=2", "parallel=single")
SLICES: dict[str, tuple[str, ...]] = {
    "nano": ("recipe=nano_bf16", "model.pattern=MEMEM*EME", "model.num_moe_experts=16", *_ONE_STAGE),
    "super": (
        "recipe=super_bf16",
        "model.pattern=MEM*EME",
        "model.mtp_pattern=''",
        "model.mtp_depths=0",
        "model.num_moe_experts=64",
        *_ONE_STAGE,
    ),
}
"""Overrides of each slice: sequence 8192, two micro-batches of one sequence. Nano's has 1.60 B parameters and 16 of 128
experts, Super's 2.65 B and 64 of 512."""


def slice_run(name: str, overrides: list[str]) -> Run:
    """The run of a slice in a world of one."""
    recipe, origins = compose([*SLICES[name], *overrides])
    return resolve(recipe, 1, origins)


def random_batches(run: Run, step: int) -> list[MicroBatch]:
    """One step's micro-batches, the same for the same ``step``."""
    stage = run.stages[0]
    generator = torch.Generator().manual_seed(step)
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


def open_gpu() -> Platform:
    """The first GPU, in a world of this process alone."""
    platform = select("cuda")
    platform.start(local_rank=0)
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(platform.collective_backend, store=store, rank=0, world_size=1)
    return platform
