"""Actions of one rank, and outcomes that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_rank_zero() -> bool:
    """True on rank 0, and in a process without process groups."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; its result, or the exception it raised, is every rank's. A collective."""
    if not dist.is_initialized():
        return action()
    outcome: list[tuple[T | None, Exception | None]] = [(None, None)]
    if dist.get_rank() == 0:
        try:
            outcome = [(action(), None)]
        except Exception as error:
            outcome = [(None, error)]
    dist.broadcast_object_list(outcome, src=0)
    result, error = outcome[0]
    if error is not None:
        raise error
    return result  # type: ignore[return-value]


def of_every_rank(value: T) -> list[T]:
    """``value`` of every rank, in the order of ranks. A collective."""
    if not dist.is_initialized():
        return [value]
    values: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
