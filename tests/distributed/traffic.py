"""What ranks do in the traffic test: one step's gradients, with the bytes that go to other ranks counted."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from layouts import batches, started
from megatron.core.tensor_parallel import layers, mappings
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor

from nemotron3_megatron.plan.communication import communication
from nemotron3_megatron.train.step import Trainer, accumulate_gradients


@dataclass
class Traffic:
    """Of one rank."""

    tokens: int = 0
    """Bytes of matrices sent to others by all-to-all."""
    gates: int = 0
    """Bytes of vectors."""
    gathered: int = 0
    """Bytes sent to others by all-gathers of tensor parallel ranks, and of experts."""
    scattered: int = 0
    """And by reduce-scatters."""
    rows_away: int = 0
    """Routed rows (a token's top-k copies) whose expert is on another rank; forward passes only."""


def traffic(worlds: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """For each layout what this rank sent, and what the plan says (bytes by operation)."""
    port = int(os.environ["MASTER_PORT"])
    results = {}
    for offset, (name, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options) as trainer, counted(trainer) as seen:
            accumulate_gradients(trainer, batches(trainer, 0), trainer.run.stages[0])
            planned: dict[str, float] = {}
            for each in communication(trainer.run, 0):
                if each.per == "layer":
                    planned[each.operation] = planned.get(each.operation, 0) + each.bytes
            modules = [module for chunk in trainer.chunks for module in chunk.modules()]
            dispatchers = [module.token_dispatcher for module in modules if hasattr(module, "token_dispatcher")]
            held = [key for each in dispatchers for key, value in vars(each).items() if _is_gathered(key, value)]
            results[name] = {**asdict(seen), "planned": planned, "held": held}
    return results


@contextmanager
def counted(trainer: Trainer) -> Iterator[Traffic]:
    """Count in the real collective and in the real dispatcher's routing map."""
    seen = Traffic()
    exchange, preprocess = torch.distributed.all_to_all_single, MoEAlltoAllTokenDispatcher.preprocess
    places = [(module, name) for module in (layers, mappings) for name in (_GATHER, _SCATTER) if hasattr(module, name)]
    places += [(torch.distributed, name) for name in _OF_EXPERTS]
    originals = [getattr(module, name) for module, name in places]
    for (module, name), original in zip(places, originals, strict=True):
        setattr(module, name, _along_sequence(original, seen, is_gather="gather" in name))
    torch.distributed.all_to_all_single = _exchange(exchange, seen)
    MoEAlltoAllTokenDispatcher.preprocess = _preprocess(preprocess, seen, trainer.groups.ep.rank())
    try:
        yield seen
    finally:
        torch.distributed.all_to_all_single = exchange
        MoEAlltoAllTokenDispatcher.preprocess = preprocess
        for (module, name), original in zip(places, originals, strict=True):
            setattr(module, name, original)


def _is_gathered(key: str, value: object) -> bool:
    return "gathered" in key and isinstance(value, Tensor)


_GATHER, _SCATTER = "dist_all_gather_func", "dist_reduce_scatter_func"
"""Megatron-Core's names for the collectives of sequence parallelism."""
_OF_EXPERTS = "all_gather_into_tensor", "reduce_scatter_tensor"
"""What ``model/gathered.py`` calls; Megatron-Core holds these functions under names of its own."""


def _along_sequence(original: Callable[..., Any], seen: Traffic, *, is_gather: bool) -> Callable[..., Any]:
    def collective(output: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        size = options["group"].size()
        whole = output if is_gather else value
        sent = whole.numel() * whole.element_size() * (size - 1) // size
        if is_gather:
            seen.gathered += sent
        else:
            seen.scattered += sent
        return original(output, value, *rest, **options)

    return collective


def _exchange(original: Callable[..., Any], seen: Traffic) -> Callable[..., Any]:
    def exchange(output: Tensor, value: Tensor, *rest: Any, **options: Any) -> Any:
        splits, group = options.get("input_split_sizes"), options["group"]
        rank, size = group.rank(), group.size()
        lengths = [value.shape[0] // size] * size if splits is None else [int(length) for length in splits]
        row = value[:1].numel() * value.element_size() if value.shape[0] else 0
        sent = row * (sum(lengths) - lengths[rank])
        if value.dim() > 1:
            seen.tokens += sent
        else:
            seen.gates += sent
        return original(output, value, *rest, **options)

    return exchange


def _preprocess(original: Callable[..., Any], seen: Traffic, rank: int) -> Callable[..., Any]:
    def preprocess(self: MoEAlltoAllTokenDispatcher, routing_map: Tensor) -> Any:
        local = routing_map.shape[1] // self.ep_size
        mine = routing_map[:, rank * local : (rank + 1) * local]
        seen.rows_away += int(routing_map.sum() - mine.sum())
        return original(self, routing_map)

    return preprocess
