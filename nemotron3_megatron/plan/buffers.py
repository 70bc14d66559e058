"""Megatron-Core's gradient buffers and the optimizer's shards of them: sizes to the byte, padding included.

The rules are those of ``DistributedOptimizer._compute_per_buffer_param_layout`` (core/optimizer/distrib_optimizer.py)
and ``group_params_for_buffers`` (core/distributed): one buffer for each type of parameter and each group that reduces
it, filled from the last parameter to the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.parameters import BYTES, Parameter

ALIGNMENT = 64
"""Elements at a multiple of which a parameter starts (core/optimizer/param_layout.py ``pad_param_start``)."""

BUCKET_ALIGNMENT = 128
"""A bucket's length is a multiple of this and of the ranks that share it (the same, ``bucket_end_divisor``)."""

MOMENTS_BYTES = 2 * 4
MASTER_BYTES = 4
"""Adam's state of one element, FP32; parameters that are FP32 themselves are their own master."""


@dataclass(frozen=True, slots=True)
class Buffer:
    """Parameters of one type and one reduction group, as they lie in memory."""

    element_bytes: int
    """Of the parameters; gradients are FP32 always."""
    expert: bool
    ranks: int
    """That reduce it, and with the distributed optimizer share its state."""
    size: int
    """Elements, padding included."""
    used: int
    buckets: tuple[tuple[int, int], ...]
    gaps: tuple[tuple[int, int], ...]
    """Padding, [start, end)."""

    def owned(self) -> tuple[int, ...]:
        """Elements without padding whose state each rank keeps under the distributed optimizer.

        Every bucket is cut into as many equal parts as there are ranks.
        """
        owned = [sum(end - start for start, end in self.buckets) // self.ranks] * self.ranks
        for start, end in self.buckets:
            part = (end - start) // self.ranks
            for low, high in self.gaps:
                if low < end and high > start:
                    for rank in range((low - start) // part, (high - 1 - start) // part + 1):
                        begin = start + rank * part
                        owned[rank] -= min(high, begin + part) - max(low, begin)
        return tuple(owned)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer, for one element."""
        return MOMENTS_BYTES + (MASTER_BYTES if self.element_bytes < 4 else 0)


def buffers(run: Run, parameters: Sequence[Parameter], pp_rank: int) -> tuple[Buffer, ...]:
    """The gradient buffers of one model chunk."""
    layout, distributed = run.layout, run.parallel.distributed_optimizer
    everybody = layout.dp * layout.cp
    found = []
    for expert in (False, True):
        ranks = everybody * layout.tp // (layout.ep * layout.etp) if expert else everybody
        for wide in (False, True):
            is_wide = run.precision.dtype == "fp32"
            mine = [p for p in parameters if p.expert == expert and (p.wide or is_wide) == wide]
            if not mine:
                continue
            # DDP overlaps the reduction of buckets on the first pipeline rank only.
            overlapped = run.parallel.overlap_grad_reduce and pp_rank == 0
            limit = max(40_000_000, 1_000_000 * everybody) if overlapped else None
            buckets, gaps = _place(mine, ranks, limit) if distributed else (_unpadded(mine), ())
            size = buckets[-1][1]
            used = sum(p.size for p in mine)
            element = 4 if wide else BYTES["bf16"]
            found.append(Buffer(element, expert, ranks, size, used, tuple(buckets), tuple(gaps)))
    return tuple(found)


def weight_bytes(run: Run, buffer: Buffer) -> int:
    """Parameters live inside a padded buffer where the distributed optimizer gathers them."""
    return buffer.element_bytes * (buffer.size if run.parallel.distributed_optimizer else buffer.used)


def optimizer_bytes(run: Run, buffer: Buffer) -> tuple[int, ...]:
    """Master weights and moments on each rank that reduces the buffer.

    (torch's Adam, used on CPUs, adds a four-byte step count for each parameter tensor.)
    """
    if run.parallel.distributed_optimizer:
        return tuple(buffer.state_bytes * owned for owned in buffer.owned())
    return (buffer.state_bytes * buffer.used,) * buffer.ranks


def _unpadded(parameters: Sequence[Parameter]) -> list[tuple[int, int]]:
    return [(0, sum(p.size for p in parameters))]


def _place(
    parameters: Sequence[Parameter], ranks: int, limit: int | None
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Buckets and padding of a buffer under the distributed optimizer."""
    divisor = math.lcm(ranks, BUCKET_ALIGNMENT)
    buckets: list[tuple[int, int]] = []
    gaps: list[tuple[int, int]] = []
    bucket_start = end = 0
    is_empty = True

    def close(last: int) -> int:
        bucket_end = _round_up(last, divisor)
        gaps.append((last, bucket_end))
        buckets.append((bucket_start, bucket_end))
        return bucket_end

    for parameter in reversed(parameters):
        start = _round_up(end, ALIGNMENT)
        gaps.append((end, start))
        if parameter.shared and not is_empty:
            start = bucket_start = close(start)
        end, is_empty = start + parameter.size, False
        if parameter.shared or (limit is not None and end - bucket_start >= limit):
            end = bucket_start = close(end)
            is_empty = True
    if not is_empty:
        close(end)
    return buckets, [gap for gap in gaps if gap[0] < gap[1]]


def _round_up(value: int, divisor: int) -> int:
    return -(-value // divisor) * divisor
