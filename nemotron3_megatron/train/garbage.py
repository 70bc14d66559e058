"""Python's garbage collector, at steps that all ranks share.

Left to itself it runs in the middle of a step, on each rank at another time, for as long as it takes to walk the
model's objects; the other ranks wait. Objects without cycles, tensors among them, are freed at once as ever.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager

COLLECT_EVERY_STEPS = 100


@contextmanager
def collected_between_steps() -> Iterator[Callable[[int], None]]:
    """Stop automatic collection; what is given collects what the last steps left, when they are a round number."""
    gc.collect()
    gc.freeze()  # what was built by now lives as long as the run
    gc.disable()

    def after_step(step: int) -> None:
        if step % COLLECT_EVERY_STEPS == 0:
            gc.collect()

    try:
        yield after_step
    finally:
        gc.enable()
        gc.unfreeze()
