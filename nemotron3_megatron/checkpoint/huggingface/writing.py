"""A weights-only distributed checkpoint written by one process, tensor by tensor."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType

from nemotron3_megatron.checkpoint.huggingface.mapping import Box, Shape
from nemotron3_megatron.checkpoint.writing import system_error

FORMAT_FILE = "metadata.json"
FORMAT = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
"""What Megatron-Core 0.19 recognises its format by (``dist_checkpointing/core.py``)."""

COMMON = "common_state/shard_0_1"
"""Key of Megatron-Core's values that are not tensors (``dist_checkpointing/serialization.py``): none here."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a checkpoint tensor that will be written."""

    box: Box
    shape: Shape
    """Of the whole tensor."""
    dtype: torch.dtype
    make: Callable[[], Tensor]
    """The elements, in any shape of as many."""

    @property
    def bytes(self) -> int:
        return torch.Size(self.box.size).numel() * self.dtype.itemsize


def write_checkpoint(chunks: Iterable[Chunk], directory: Path, file_bytes: int) -> None:
    """Write all files but the manifest into the existing, empty ``directory``. Memory holds one file's tensors.

    Args:
        chunks: parts of tensors, which together cover them.
        directory: existing, empty.
        file_bytes: size at which a file is ended.

    Raises:
        OSError: a file could not be written.
    """
    plans = [SavePlan([_common()])]
    makers: dict[MetadataIndex, Chunk] = {}
    for file in _files(chunks, file_bytes):
        makers |= {_index(chunk): chunk for chunk in file}
        plans.append(SavePlan([_item(chunk) for chunk in file]))
    # torch's writer keeps every tensor of a file until it is closed: hence a plan, as of a rank, for each file.
    plans, metadata = create_default_global_save_plan(plans, rewrite_index_hints=False)
    writer, planner = FileSystemWriter(directory), _Planner(makers)
    writer.set_up_storage_writer(True)
    results = []
    try:
        for plan in writer.prepare_global_plan(plans):
            results.append(writer.write_data(plan, planner).wait())
        writer.finish(metadata, results)
    except RuntimeError as error:  # how torch tells of a full disk
        raise system_error(error) from error
    (directory / FORMAT_FILE).write_text(json.dumps(FORMAT), encoding="utf-8")


def _files(chunks: Iterable[Chunk], file_bytes: int) -> Iterator[list[Chunk]]:
    file: list[Chunk] = []
    size = 0
    for chunk in chunks:
        file.append(chunk)
        size += chunk.bytes
        if size >= file_bytes:
            yield file
            file, size = [], 0
    if file:
        yield file


def _index(chunk: Chunk) -> MetadataIndex:
    return MetadataIndex(chunk.box.key, torch.Size(chunk.box.start))


def _item(chunk: Chunk) -> WriteItem:
    place = ChunkStorageMetadata(torch.Size(chunk.box.start), torch.Size(chunk.box.size))
    data = TensorWriteData(place, TensorProperties(dtype=chunk.dtype), torch.Size(chunk.shape))
    return WriteItem(_index(chunk), WriteItemType.SHARD, tensor_data=data)


def _common() -> WriteItem:
    return WriteItem(MetadataIndex(COMMON), WriteItemType.BYTE_IO)


class _Planner(SavePlanner):
    """Makes each tensor when its turn has come."""

    def __init__(self, chunks: dict[MetadataIndex, Chunk]) -> None:
        self._chunks = chunks

    def set_up_planner(self, *args: Any, **kwargs: Any) -> None:
        """The plan is made beforehand."""

    def create_local_plan(self) -> SavePlan:
        raise NotImplementedError("the plan is made beforehand")

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        raise NotImplementedError("the plan is made beforehand")

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([{}], stream)
            return stream
        chunk = self._chunks[write_item.index]
        return chunk.make().reshape(chunk.box.size)
