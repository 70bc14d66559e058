"""Which rank writes which part of which tensor: agreed on once, and reused as long as nothing changes."""

from __future__ import annotations

import io
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.filesystem import _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan

from nemotron3_megatron.checkpoint.collective import is_rank_zero, lowest, on_rank_zero, to_rank_zero


@dataclass(frozen=True, slots=True)
class Shards:
    """This rank's part of a checkpoint in Megatron's torch_dist format."""

    plan: SavePlan
    """Its items, and the prefix of the files they go to."""
    data: tuple[torch.Tensor | io.BytesIO, ...]
    """Of each item: the live tensor, or a serialised object."""
    metadata: Metadata | None
    """The index of the whole checkpoint; rank 0 has it."""


@dataclass(frozen=True, slots=True)
class _Agreed:
    signature: tuple[Any, ...]
    parallel: FullyParallelSaveStrategyWrapper
    plan: SavePlan
    metadata: Metadata | None
    shapes: tuple[torch.Size | None, ...]
    """Of each item, None for objects: the plan has leading axes that live tensors lack."""
    is_direct: bool
    """Whether the live tensors are what Megatron-Core's own way to a plan's data leads to."""


class Planner:
    """Plans saves; remembers the last plan, because between two saves of a run nothing but the values changes."""

    def __init__(self) -> None:
        self._agreed: _Agreed | None = None

    def shards(self, content: dict[str, Any], replicas: dist.ProcessGroup) -> Shards:
        """Divide ``content`` (sharded state dict) among the ranks. A collective.

        Ranks of ``replicas`` that hold the same tensors share the writing of them.

        Raises:
            ValueError: the ranks together do not hold every element of every tensor exactly once.
        """
        apply_factories(content)
        signature = _signature(content)
        last = self._agreed
        known = bool(lowest(int(last is not None and last.signature == signature)))
        if known and last is not None and last.is_direct:
            return Shards(last.plan, _live(content, last), last.metadata)
        if known and last is not None:
            parallel = last.parallel
        else:
            parallel = FullyParallelSaveStrategyWrapper(
                TorchDistSaveShardedStrategy(), replicas, do_cache_distribution=True
            )
        planner = _resolver(dict(content), parallel, validate=not known)
        if not known or last is None:
            plan = planner.create_local_plan()
            metadata = _index(planner, plan)
            plan = replace(plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))
            last = self._agreed = _agreed(_Agreed(signature, parallel, plan, metadata, (), False), planner, content)
        return Shards(last.plan, tuple(planner.resolve_data(item) for item in last.plan.items), last.metadata)


def _resolver(
    content: dict[str, Any], parallel: FullyParallelSaveStrategyWrapper | None, *, validate: bool
) -> MCoreSavePlanner:
    """Megatron-Core's way to the data of a plan's items.

    Args:
        content: sharded state dict.
        parallel: divides replicated tensors among the ranks; None: there are none.
        validate: check that the ranks hold each element once. A collective.
    """
    sharded, common = save_preprocess(content, validate_access_integrity=validate)
    # Megatron-Core reads plain values from this object, and refuses a checkpoint without it.
    sharded["common_state"] = ShardedObject("common_state", common, (1,), (0,), replica_id=dist.get_rank())
    if parallel is not None:
        parallel.apply_saving_parallelization(sharded)
    kept, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False)
    planner.set_up_planner(mcore_to_pyt_state_dict(kept), is_coordinator=is_rank_zero())
    return planner


def _agreed(new: _Agreed, planner: MCoreSavePlanner, content: dict[str, Any]) -> _Agreed:
    """Compare the short way with Megatron-Core's, whose steps over all tensors take longest in a save."""
    resolved = [planner.resolve_data(item) for item in new.plan.items]
    shapes = tuple(value.shape if isinstance(value, torch.Tensor) else None for value in resolved)
    known = replace(new, shapes=shapes)
    try:
        short = _live(content, known)
    except (KeyError, RuntimeError):
        return known
    return replace(known, is_direct=all(map(_is_same, short, resolved)))


def _is_same(a: torch.Tensor | io.BytesIO, b: torch.Tensor | io.BytesIO) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return (a.data_ptr(), a.shape, a.stride(), a.dtype) == (b.data_ptr(), b.shape, b.stride(), b.dtype)
    return type(a) is type(b)


def _live(content: dict[str, Any], agreed: _Agreed) -> tuple[torch.Tensor | io.BytesIO, ...]:
    """Of each item of the plan: tensors straight from ``content``, objects by Megatron-Core.

    Raises:
        KeyError: a tensor of the plan is not in ``content``.
        RuntimeError: it has another size.
    """
    tensors, rest = extract_matching_values(content, lambda value: isinstance(value, ShardedTensor))
    places = {(each.key, tuple(each.global_offset)): each.data.detach() for each in nested_values(tensors)}
    planner = _resolver(rest, None, validate=False)
    return tuple(
        planner.resolve_data(item)
        if shape is None
        else places[item.index.fqn, tuple(item.index.offset or ())].view(shape)
        for item, shape in zip(agreed.plan.items, agreed.shapes, strict=True)
    )


def _signature(content: dict[str, Any]) -> tuple[Any, ...]:
    """Everything a plan depends on: not the values, and not where they lie."""
    return tuple(
        (item.key, tuple(item.global_offset), tuple(item.local_shape), item.dtype, item.replica_id)
        if isinstance(item, ShardedTensor)
        else (item.key, tuple(item.data.shape) if isinstance(item.data, torch.Tensor) else None, item.replica_id)
        for item in nested_values(content)
        if isinstance(item, ShardedBase)  # plain values are written as they are
    )


def _index(planner: MCoreSavePlanner, plan: SavePlan) -> Metadata | None:
    """The index of all ranks' items, on rank 0; torch checks there that they cover each tensor exactly once."""
    plans = to_rank_zero(plan)
    found: list[Metadata] = []

    def merge() -> None:
        found.append(planner.create_global_plan(plans)[1])

    on_rank_zero(merge)
    return found[0] if found else None
