"""What ranks do in the tests of long sequences."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from layouts import measure, started
from tiny import VOCABULARY, tiny_run

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import build_micro_batch
from nemotron3_megatron.model import mixer, moe_parts
from nemotron3_megatron.model.parts import tokens_at_a_time
from nemotron3_megatron.train.step import train_step


def growth(length: int) -> int:
    """Bytes that a process's peak grows by in one step on one sequence, half of it on each rank (all features)."""

    def long_run(world_size: int, **options: Any) -> Run:
        run = tiny_run(world_size, **options)
        shape = {"seq_length": length, "tokens_per_step": length}
        stage = replace(run.stages[0], global_batch_size=1, micro_batch_size=1, num_microbatches=1, **shape)
        return replace(run, stages=(stage,))

    with started({"cp": 2, "recompute": "full"}, long_run) as trainer:
        window = torch.randint(1, VOCABULARY, (1, length + 1), generator=torch.Generator().manual_seed(0))
        batch = build_micro_batch(window, mtp_depths=2, eod_token=0, isolate_documents=True)
        mine = batch.shard(trainer.groups.cp.rank(), 2)
        before = trainer.platform.peak_memory_bytes()
        train_step(trainer, [mine], trainer.run.stages[0], 1e-3)
        return trainer.platform.peak_memory_bytes() - before


def measure_whole_and_in_parts(folder: str, world: dict[str, Any], limit_bytes: int) -> dict[str, Any]:
    """``layouts.measure`` of ``whole``, and of ``parts``, whose experts take ``limit_bytes`` of rows and whose Mamba
    norms take 5 positions of 2 sequences of 64 values at a time."""
    results = measure(folder, {"whole": world})
    os.environ["MASTER_PORT"] = str(int(os.environ["MASTER_PORT"]) + 1)
    asked: list[int] = []

    def limited(tokens: int, bytes_a_token: int) -> int:
        asked.append(tokens_at_a_time(tokens, bytes_a_token, limit_bytes))
        return asked[-1]

    moe_parts.tokens_at_a_time = limited
    mixer.LARGEST_INDEX = 5 * 2 * 64
    return results | measure(folder, {"parts": world}) | {"largest_part": max(asked)}
