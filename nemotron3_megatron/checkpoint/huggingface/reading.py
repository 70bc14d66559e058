"""Boxes of the tensors of a distributed checkpoint, one at a time, without a process group or a model."""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable
from math import prod
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from nemotron3_megatron.checkpoint import manifest
from nemotron3_megatron.checkpoint.huggingface.mapping import Box, Entry, Shape
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.config.errors import UserError

OPTIMIZER = "optimizer."
"""Keys of Adam's tensors begin with this."""


class CheckpointReader:
    """Reads what is asked for: memory holds one box and the stored shard it comes from."""

    def __init__(self, path: Path) -> None:
        """Open a complete checkpoint whose bytes are those that were written (all of them are read once).

        Raises:
            UserError: it is incomplete or damaged.
        """
        self.path = path
        try:
            self.manifest: Manifest = manifest.verify(path)
            manifest.verify_contents(self.manifest, path)
            self._files = FileSystemReader(path)
            metadata = self._files.read_metadata()
        except (ValueError, OSError, pickle.UnpicklingError) as damage:
            raise UserError(f"checkpoint {path}", why=f"it cannot be used: {damage}") from None
        self._files.set_up_storage_reader(metadata, True)
        stored = metadata.state_dict_metadata.items()
        self._tensors = {
            key: entry
            for key, entry in stored
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER)
        }

    @property
    def shapes(self) -> dict[str, Shape]:
        """Global shape of every weight and buffer, by key."""
        return {key: tuple(entry.size) for key, entry in self._tensors.items()}

    def dtype(self, entry: Entry) -> torch.dtype:
        """Type of a published tensor's boxes."""
        dtype: torch.dtype = self._tensors[entry.boxes[0].key].properties.dtype
        return dtype

    def box(self, box: Box) -> Tensor:
        """The elements of ``box``, in its shape."""
        tensor = self._tensors[box.key]
        target = torch.empty(box.size, dtype=tensor.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(box.start), torch.Size(box.size))
        items = create_read_items_for_chunk_list(box.key, tensor, [wanted])
        found = sum(prod(item.lengths) for item in items)
        if found != target.numel():
            raise UserError(
                f"checkpoint {self.path}", why=f"it holds {found:,} of {target.numel():,} elements of {box.key}"
            )
        self._files.read_data(LoadPlan(items), _Into(target)).wait()
        return target

    def tensor(self, entry: Entry) -> Tensor:
        """A published tensor."""
        return joined(entry, map(self.box, entry.boxes))


def joined(entry: Entry, boxes: Iterable[Tensor]) -> Tensor:
    """A published tensor from the elements of its boxes."""
    parts = [box.reshape(-1, *entry.shape[1:]) for box in boxes]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Into(LoadPlanner):
    """Puts every item that is read at its place in one tensor."""

    def __init__(self, target: Tensor) -> None:
        self._target = target

    def set_up_planner(
        self, state_dict: object, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """The plan is made beforehand."""

    def create_local_plan(self) -> LoadPlan:
        raise NotImplementedError("the plan is made beforehand")

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        raise NotImplementedError("only tensors are read")

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        place = self._target
        for axis, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            place = place.narrow(axis, start, length)
        return place

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """``resolve_tensor`` gave the place itself."""
