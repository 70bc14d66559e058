"""One process's part of a training step on one long sequence: what ``long_context.py`` starts for each length."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from slices import Place, open_gpu

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.parallel.groups import start_groups
from nemotron3_megatron.platform import Platform, select
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.step import Trainer, train_step

MODELS: dict[str, tuple[str, ...]] = {
    "tiny": ("recipe=tiny", "parallel.recompute=full"),
    "nano": (
        "recipe=nano_bf16",
        "model.pattern=MEM*EME",
        "model.num_moe_experts=16",
        "~stages.phase2",
        "optimizer.lr_decay=null",
        "optimizer.lr_warmup=0 tokens",
        "parallel.recompute=full",
        "data.isolate_documents=false",
    ),
}
"""Overrides of each model. Layers are recomputed. ``tiny`` is otherwise the recipe itself, all features; ``nano`` a
slice with Nano's full widths and 16 of its 128 experts, a sequence one document: the dearest attention."""

KINDS = {"M": "mamba", "*": "attention", "E": "moe", "-": "mlp"}
REST = "rest"
"""Embedding, MTP, loss and update."""
DOCUMENT_TOKENS = 3000
"""Mean length of the random documents where they are isolated (``eod`` drawn at each position)."""


@dataclass(frozen=True, slots=True)
class Measured:
    """What one rank saw."""

    seconds: list[float]
    """Of each step, the first one included."""
    loss: float
    peak: int
    """Bytes: of CUDA's allocator, or resident on a CPU."""
    before: int
    """Bytes before the first step: interpreter, libraries, weights, optimizer."""
    shares: dict[str, float]
    """Of the last step's time, by kind of layer and ``REST``; empty where layers are not recomputed."""
    error: str = ""
    """Why there is nothing else."""


def long_run(model: str, device: str, length: int, cp: int, overrides: list[str]) -> Run:
    """A run whose step is one sequence of ``length`` tokens; ``overrides`` win."""
    stage = "main" if model == "tiny" else "phase1"
    sizes = {"seq_length": length, "global_batch_size": 1, "micro_batch_size": 1, "tokens": f"{1000 * length} tokens"}
    shape = [f"stages.{stage}.{key}={value}" for key, value in sizes.items()]
    tail = f"optimizer.lr_wsd_decay={100 * length} tokens"
    layout = ("parallel=single", f"parallel.cp={cp}", f"device={device}")
    given = {override.split("=")[0] for override in overrides}
    preset = [each for each in (*layout, *MODELS[model], *shape, tail) if each.split("=")[0] not in given]
    recipe, origins = compose([*preset, *overrides])
    return resolve(recipe, cp, origins)


def measure(run: Run, steps: int, place: Place) -> Measured:
    """Build the model in this process and take ``steps`` steps; memory that does not suffice is an answer too.

    A rank that fails among several ends its process at once: the others would wait for it in a collective, and end
    when their pool sees it gone.
    """
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    platform = open_gpu(place) if run.device == "cuda" else _open_cpu(place)
    try:
        return _measure(run, steps, platform, place)
    except torch.cuda.OutOfMemoryError as error:
        reason = f"out of memory on rank {place.rank}: {str(error).split('. ')[0]}"
        if place.world_size == 1:
            return Measured([], 0.0, platform.peak_memory_bytes(), 0, {}, reason)
        print(reason, file=sys.stderr, flush=True)
    except Exception:
        if place.world_size == 1:
            raise
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(3)


def _measure(run: Run, steps: int, platform: Platform, place: Place) -> Measured:
    trainer = build_trainer(run, platform, start_groups(run, platform))
    clock = _LayerClock(trainer) if run.parallel.recompute == "full" else None
    before = platform.peak_memory_bytes()
    seconds: list[float] = []
    loss = 0.0
    for number in range(steps):
        batch = _batch(run, number).shard(place.rank, place.world_size)
        torch.distributed.barrier()
        begin = time.perf_counter()
        if clock is not None:
            clock.start()
        loss = train_step(trainer, [batch], run.stages[0], 1e-4).losses[0]
        platform.synchronize()
        seconds.append(time.perf_counter() - begin)
    measured = Measured(seconds, loss, platform.peak_memory_bytes(), before, {} if clock is None else clock.shares())
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return measured


def _open_cpu(place: Place) -> Platform:
    os.environ["LOCAL_WORLD_SIZE"] = str(place.world_size)
    platform = select("cpu")
    platform.start(local_rank=place.rank)
    stores: Any = torch.distributed  # lacks type stubs
    store = stores.FileStore(place.store, place.world_size) if place.store else stores.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=place.rank, world_size=place.world_size)
    return platform


def _batch(run: Run, step: int) -> MicroBatch:
    """A sequence of random tokens, the same for the same ``step``."""
    generator = torch.Generator().manual_seed(step)
    shape = (1, run.stages[0].seq_length + 1)
    window = torch.randint(1, run.model.vocab_size, shape, generator=generator)
    if run.data.isolate_documents:
        window[torch.rand(shape, generator=generator) < 1 / DOCUMENT_TOKENS] = run.data.eod_token
    return build_micro_batch(
        window,
        mtp_depths=run.model.mtp_depths,
        eod_token=run.data.eod_token,
        isolate_documents=run.data.isolate_documents,
    )


class _LayerClock:
    """Time by kind of layer, from marks around each layer's forward passes (CUDA events, or a CPU's clock).

    With full recomputation a layer's forward pass in the backward phase (gradients are on) is followed by its own
    backward pass, which lasts until the next layer is recomputed or the embedding gets its gradient.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.marks: list[tuple[Any, str]] = []
        self.on_gpu = trainer.platform.name == "cuda"
        chunk = trainer.chunks[0]
        for layer, symbol in zip(chunk.decoder.layers, trainer.run.model.pattern, strict=True):
            layer.register_forward_pre_hook(self._marker(KINDS[symbol]))
            layer.register_forward_hook(self._marker(KINDS[symbol], after=True))
        chunk.embedding.register_forward_hook(self._watch_embedding)

    def start(self) -> None:
        """A step begins."""
        self.marks.clear()
        self._mark(REST)

    def shares(self) -> dict[str, float]:
        """Of the time since ``start``; call when the device is idle."""
        self._mark(REST)
        if self.on_gpu:
            torch.cuda.synchronize()
        spent: dict[str, float] = {}
        for (begin, kind), (end, _) in zip(self.marks, self.marks[1:], strict=False):
            spent[kind] = spent.get(kind, 0.0) + (begin.elapsed_time(end) if self.on_gpu else end - begin)
        return {kind: value / sum(spent.values()) for kind, value in spent.items()}

    def _marker(self, kind: str, after: bool = False) -> Callable[..., None]:
        return lambda *_: self._mark(REST if after and not torch.is_grad_enabled() else kind)

    def _watch_embedding(self, _module: object, _inputs: object, output: torch.Tensor) -> None:
        output.register_hook(lambda _: self._mark(REST))

    def _mark(self, kind: str) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append((event, kind))
        else:
            self.marks.append((time.perf_counter(), kind))
