"""Collectives between this machine's GPUs: right results, and how fast they are.

One process a GPU. Bandwidth is what leaves a GPU ("bus bandwidth" of nccl-tests): of S bytes that a rank holds before
(or after) the exchange, (n - 1) / n go to (or come from) others.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist
from torch.multiprocessing.spawn import spawn

from nemotron3_megatron.accelerators import data_sheet
from nemotron3_megatron.platform.checks.outcome import Comparison, Measurement, Outcome, UnavailableError
from nemotron3_megatron.platform.checks.speed import median_seconds

LEAST = 0.2
"""Share of NVLink's bandwidth below which traffic goes another way: PCIe 5.0 x16 has 64 GB/s, a seventh of NVLink 4."""

TIMEOUT = timedelta(seconds=60)
NAMES = ("all-to-all", "all-gather", "reduce-scatter")


@dataclass(frozen=True, slots=True)
class _Found:
    name: str
    wrong: float
    """Share of wrong numbers."""
    bytes_per_second: float


def exchange(device: torch.device, dtype: torch.dtype) -> Outcome:
    """All-to-all, all-gather and reduce-scatter of all GPUs.

    Raises:
        UnavailableError: there is one GPU.
    """
    world = torch.cuda.device_count() if device.type == "cuda" else 1
    if world < 2:
        raise UnavailableError("one GPU: nothing to exchange")
    sheet = data_sheet(torch.cuda.get_device_name(device))
    return exchange_between(world, "nccl", 2**27, sheet.nvlink_bandwidth if sheet else None)


def exchange_between(world: int, backend: str, elements: int, peak: float | None) -> Outcome:
    """Spawn the ranks and gather what the slowest found.

    Args:
        world: ranks; of NCCL, each on the GPU of its number.
        backend: ``nccl`` or ``gloo``.
        elements: BF16 numbers a rank holds; a multiple of the world.
        peak: bytes a second and direction of the data sheet.
    """
    with tempfile.TemporaryDirectory() as folder:
        spawn(_rank, args=(world, backend, elements, folder), nprocs=world)
        files = [Path(folder) / f"{rank}.json" for rank in range(world)]
        ranks = [[_Found(**found) for found in json.loads(file.read_text())] for file in files]
    names = [found.name for found in ranks[0]]
    worst = [max(rank[i].wrong for rank in ranks) for i in range(len(names))]
    slowest = [min(rank[i].bytes_per_second for rank in ranks) for i in range(len(names))]
    return Outcome(
        tuple(Comparison(name, wrong, 0.0) for name, wrong in zip(names, worst, strict=True)),
        tuple(Measurement(name, speed, "B/s", peak, LEAST) for name, speed in zip(names, slowest, strict=True)),
        note=f"{world} ranks, {2 * elements / 2**20:,.0f} MiB each",
    )


def _rank(rank: int, world: int, backend: str, elements: int, folder: str) -> None:
    device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/meeting",
        rank=rank,
        world_size=world,
        timeout=TIMEOUT,
        device_id=device if device.type == "cuda" else None,
    )
    try:
        found = [asdict(each) for each in _measure(rank, world, elements, device)]
        (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _measure(rank: int, world: int, elements: int, device: torch.device) -> list[_Found]:
    """Numbers up to 8 bits, which BF16 holds and adds exactly."""
    part = elements // world
    place = torch.arange(part, device=device) % 8
    whole = torch.cat([rank * world + to + place for to in range(world)]).bfloat16()
    target, shard = torch.empty_like(whole), torch.empty_like(whole[:part])
    mine = (rank + place).bfloat16()
    sources = range(world)
    sent = torch.cat([source * world + rank + place for source in sources])
    gathered = torch.cat([source + place for source in sources])
    total = sum(((source * world + rank) % 8 + place for source in sources), torch.zeros_like(place))
    addends = torch.cat([(rank * world + to) % 8 + place for to in range(world)]).bfloat16()
    cases: tuple[tuple[Callable[[], object], Tensor, Tensor], ...] = (
        (lambda: dist.all_to_all_single(target, whole), target, sent),
        (lambda: dist.all_gather_into_tensor(target, mine), target, gathered),
        (lambda: dist.reduce_scatter_tensor(shard, addends), shard, total),
    )
    found = []
    for name, (call, result, expected) in zip(NAMES, cases, strict=True):
        seconds = median_seconds(call, device)
        wrong = float((result != expected.bfloat16()).float().mean())
        found.append(_Found(name, wrong, 2 * elements * (world - 1) / world / seconds))
    return found
