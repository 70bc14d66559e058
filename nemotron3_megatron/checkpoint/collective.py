"""Actions of one rank, and outcomes that all ranks share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist


def is_rank_zero() -> bool:
    """True on rank 0, and in a process without process groups."""
    return not dist.is_initialized() or dist.get_rank() == 0


def on_rank_zero[T](action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0; its result, or the exception it raised, is every rank's. A collective."""
    if not dist.is_initialized():
        return action()
    outcome = [_outcome(action) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(outcome, src=0)
    assert outcome[0] is not None
    return outcome[0].result()


def on_every_rank[T](action: Callable[[], T]) -> list[T]:
    """Run ``action`` everywhere; the results in rank order, or the first rank's exception. A collective."""
    if not dist.is_initialized():
        return [action()]
    mine = _outcome(action)
    outcomes = [mine] * dist.get_world_size()
    dist.all_gather_object(outcomes, mine)
    return [outcome.result() for outcome in outcomes]


def to_rank_zero[T](value: T) -> list[T] | None:
    """Every rank's value in rank order, on rank 0; None elsewhere. A collective."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[T] | None = [value] * dist.get_world_size() if dist.get_rank() == 0 else None
    dist.gather_object(value, values, dst=0)
    return values


def lowest(value: int) -> int:
    """The smallest of all ranks' values. A collective of one number, cheap enough for every step."""
    if not dist.is_initialized():
        return value
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    number = torch.tensor([value], dtype=torch.int64, device=device)
    dist.all_reduce(number, op=dist.ReduceOp.MIN)
    return int(number.item())


@dataclass(frozen=True, slots=True)
class _Outcome[T]:
    value: T | None
    error: Exception | None

    def result(self) -> T:
        if self.error is not None:
            raise self.error
        return self.value  # type: ignore[return-value]


def _outcome[T](action: Callable[[], T]) -> _Outcome[T]:
    try:
        return _Outcome(action(), None)
    except Exception as error:
        return _Outcome(None, error)
