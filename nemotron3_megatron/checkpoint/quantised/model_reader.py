"""Boxes of a whole model in this process, by the names that a checkpoint of it would have."""

from __future__ import annotations

from collections import defaultdict

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedStateDict, ShardedTensor, apply_factories
from torch import Tensor

from nemotron3_megatron.checkpoint.huggingface.mapping import Box, Entry
from nemotron3_megatron.checkpoint.huggingface.reading import joined


class ModelReader:
    """As ``huggingface.reading.CheckpointReader`` reads files; what changes in the model changes here."""

    def __init__(self, sharded: ShardedStateDict) -> None:
        """Take hold of the tensors of ``sharded``: of all layers, undivided, but for experts, one tensor each."""
        apply_factories(sharded)
        self._tensors: defaultdict[str, dict[int, ShardedTensor]] = defaultdict(dict)
        for tensor in nested_values(sharded):
            if isinstance(tensor, ShardedTensor):
                self._tensors[tensor.key][tensor.global_offset[0]] = tensor

    def dtype(self, entry: Entry) -> torch.dtype:
        """Type of a published tensor's boxes."""
        dtype: torch.dtype = self._tensors[entry.boxes[0].key][0].data.dtype
        return dtype

    def box(self, box: Box) -> Tensor:
        """The elements of ``box``, in its shape, on the CPU."""
        parts = self._tensors[box.key]
        part = parts.get(box.start[0], parts[0])
        whole: Tensor = part.data.detach().reshape(*[1] * part.prepend_axis_num, *part.data.shape)
        for axis, (start, size) in enumerate(zip(box.start, box.size, strict=True)):
            whole = whole.narrow(axis, start - part.global_offset[axis], size)
        return whole.cpu()

    def tensor(self, entry: Entry) -> Tensor:
        """A published tensor."""
        return joined(entry, map(self.box, entry.boxes))
