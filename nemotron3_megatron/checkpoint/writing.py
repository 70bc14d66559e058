"""A rank's files: written, flushed, checksummed, and compared with a sample of what was to be saved.

Runs in the training process or in the worker (:mod:`.worker`); needs no process group and no GPU.
"""

from __future__ import annotations

import io
import os
import random
import traceback
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.manifest import FileRecord, Sample

SAMPLED_TENSORS = 64
"""Per rank and save, others each time. An asynchronous writer that saves an old buffer saves all of it."""
SAMPLED_ELEMENTS = 64
"""Evenly spaced, of each sampled tensor."""

Data = Sequence[torch.Tensor | io.BytesIO]


@dataclass(frozen=True, slots=True)
class Written:
    """What a rank wrote."""

    files: dict[str, FileRecord]
    results: list[WriteResult]
    samples: tuple[Sample, ...]


def take_samples(plan: SavePlan, data: Data, seed: int) -> tuple[Sample, ...]:
    """Fingerprints of some of the live tensors, chosen by ``seed``."""
    places = [place for place, value in enumerate(data) if isinstance(value, torch.Tensor)]
    chosen = random.Random(seed).sample(places, min(SAMPLED_TENSORS, len(places)))
    return tuple(_sample(plan.items[place], data[place]) for place in sorted(chosen))


def write(directory: Path, plan: SavePlan, data: Data, samples: tuple[Sample, ...]) -> Written:
    """Write the items of ``plan`` into ``directory`` and read back what ``samples`` fingerprint.

    Raises:
        OSError: a file could not be written.
        ValueError: a file does not hold what was to be saved.
    """
    planner = _Resolved(plan, data)
    # One thread: torch loses the errors of the others.
    writer = FileSystemWriter(directory, thread_count=1, sync_files=True)
    try:
        results = writer.write_data(plan, planner).wait()
    except Exception as error:
        raise system_error(error) from error
    stored = {(r.index.fqn, tuple(r.index.offset or ())): r.storage_data for r in results}
    for sample in samples:
        require_same(sample, read_tensor(directory, stored[sample.key, sample.offset]))
    names = sorted({result.storage_data.relative_path for result in results})
    return Written({name: manifest.record(directory / name) for name in names}, results, samples)


def read_tensor(directory: Path, place: _StorageInfo) -> torch.Tensor:
    """One stored tensor, or part of one, as it is on disk."""
    with open(directory / place.relative_path, "rb") as file:
        file.seek(place.offset)
        stored = io.BytesIO(file.read(place.length))
    tensor: torch.Tensor = torch.load(stored, map_location="cpu", weights_only=True)
    return tensor


def require_same(sample: Sample, stored: torch.Tensor) -> None:
    """Compare a tensor on disk with the fingerprint that was taken of it while it was live.

    Raises:
        ValueError: they differ.
    """
    if fingerprint(stored) != sample.crc32:
        raise ValueError(
            f"{sample.key} at {list(sample.offset)} is not what was to be saved (a sample of its elements differs)"
        )


def fingerprint(tensor: torch.Tensor) -> int:
    """Checksum of at most SAMPLED_ELEMENTS evenly spaced elements, of any dtype and on any device."""
    flat = tensor.detach().reshape(-1)
    step = max(1, -(-flat.numel() // SAMPLED_ELEMENTS))
    return zlib.crc32(flat[::step].contiguous().cpu().view(torch.uint8).numpy().tobytes())


def system_error(error: BaseException) -> Exception:
    """The system error behind ``error`` (torch hides a full disk behind its own), else ``error`` in words.

    The result can be sent to another process. The local variables of the calls that failed are dropped: where they hold
    the buffer of a ``BytesIO`` in a cycle, as torch's writer does, Python 3.12.0 and 3.12.1 crash when they collect it
    (CPython issue 111049), long after the error was dealt with.
    """
    cause: BaseException | None = error
    while cause is not None:
        traceback.clear_frames(cause.__traceback__)
        if isinstance(cause, OSError) and cause.errno is not None:
            return OSError(cause.errno, os.strerror(cause.errno))
        cause = cause.__cause__ or cause.__context__
    return ValueError(f"{type(error).__name__}: {error}")


def _sample(item: WriteItem, tensor: torch.Tensor | io.BytesIO) -> Sample:
    assert isinstance(tensor, torch.Tensor)
    return Sample(item.index.fqn, tuple(item.index.offset or ()), fingerprint(tensor))


class _Resolved(DefaultSavePlanner):
    """Hands out data that is already there."""

    def __init__(self, plan: SavePlan, data: Data) -> None:
        super().__init__()
        self._data = {id(item): value for item, value in zip(plan.items, data, strict=True)}

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self._data[id(write_item)]
