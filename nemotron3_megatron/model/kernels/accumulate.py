"""Weight gradients of all experts of a layer, added into their FP32 buffers by one kernel.

DDP lays the experts' buffers out one behind the other, so they are evenly spaced; one addition an expert would be 256
launches a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 2048


def add_evenly_spaced(targets: Sequence[Tensor], distance: int, source: Tensor) -> None:
    """Add ``source[i]`` to ``targets[i]``.

    Args:
        targets: (N, K) float32 each, ``distance`` elements from each to the next (``wgrad.spacing``).
        distance: in elements.
        source: (E, N, K) contiguous.
    """
    size = targets[0].numel()
    _add[(triton.cdiv(size, _BLOCK), len(targets))](targets[0], source, distance, size, BLOCK=_BLOCK)


@triton.jit(do_not_specialize=["distance"])
def _add(target, source, distance, size, BLOCK: tl.constexpr):
    expert = tl.program_id(1).to(tl.int64)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < size
    sums = target + expert * distance + place
    added = tl.load(source + expert * size + place, mask=mask).to(tl.float32)
    tl.store(sums, tl.load(sums, mask=mask) + added, mask=mask)
