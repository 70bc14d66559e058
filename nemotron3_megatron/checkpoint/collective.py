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


def on_every_rank(action: Callable[[], T]) -> list[T]:
    """Run ``action`` everywhere; the results in rank order, or the first rank's exception. A collective."""
    if not dist.is_initialized():
        return [action()]
    mine: tuple[T | None, Exception | None]
    try:
        mine = (action(), None)
    except Exception as error:
        mine = (None, error)
    outcomes = [mine] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine)
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]  # type: ignore[misc]
