"""Which parameters a stage trains; the others, and expert biases, keep their values exactly.

A frozen parameter stays in the optimizer, so that checkpoints are the same whatever is trained and a later stage can
train it again: its gradient is dropped before the gradient norm is taken, and its learning rate is 0. Its moments
decay meanwhile. It saves neither memory nor time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.distributed import DistributedDataParallel

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.model.builder import model_sharded_state
from nemotron3_megatron.model.hybrid import Nemotron3Model

FROZEN = "is_frozen"
"""Attribute of a parameter, or of a router's expert bias, which Megatron-Core moves beside the optimizer."""


def freeze(chunks: Sequence[Nemotron3Model], trainable: Sequence[str]) -> None:
    """Mark every parameter and expert bias in whose global name none of the expressions is found. A collective.

    Args:
        chunks: this rank's.
        trainable: regular expressions; without any, nothing is marked.

    Raises:
        UserError: an expression finds nothing on any rank.
    """
    if not trainable:
        return
    names = [name for chunk in chunks for name in global_names(chunk).values()]
    found = {name: [text for text in trainable if re.search(text, name)] for name in names}
    everywhere: list[dict[str, list[str]]] = [{} for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everywhere, found)
    every = {name: texts for each in everywhere for name, texts in each.items()}
    matched = {text for texts in every.values() for text in texts}
    for text in trainable:
        if text not in matched:
            raise UserError(f"trainable={text}", why="is found in no parameter's name", nearest=min(every))
    for chunk in chunks:
        own = global_names(chunk)
        for tensor in (*chunk.parameters(), *(buffer for buffer in chunk.buffers() if id(buffer) in own)):
            setattr(tensor, FROZEN, not found[own[id(tensor)]])


def is_frozen(tensor: torch.Tensor) -> bool:
    """Whether the stage in force leaves a parameter or an expert bias as it is."""
    return bool(getattr(tensor, FROZEN, False))


def drop_frozen_gradients(model: Sequence[DistributedDataParallel]) -> None:
    """Zero the gradients of frozen parameters, so that they count in no norm."""
    for wrapped in model:
        for parameter in wrapped.parameters():
            if is_frozen(parameter):
                parameter.main_grad.zero_()


def global_names(chunk: Nemotron3Model) -> dict[int, str]:
    """Checkpoint names by ``id`` of parameters and buffers, with an expert's number in brackets.

    Module names would mislead: they count layers from the pipeline stage's first and experts from the rank's first.
    """
    names = {}
    for tensor in nested_values(model_sharded_state(chunk, chunk.pg_collection)):
        if isinstance(tensor, ShardedTensor | ShardedTensorFactory):
            expert = tensor.global_offset[: tensor.prepend_axis_num] if isinstance(tensor, ShardedTensor) else ()
            names[id(tensor.data)] = f"{tensor.key}{list(expert) or ''}"
    return names
