"""What stands in for a CUDA graph where there is no GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from nemotron3_megatron.train.graph import CapturedPasses


class Uncaptured(CapturedPasses):
    """Each call computes."""

    def __call__(self, passes: Callable[[list[Tensor]], Tensor], inputs: Sequence[Tensor]) -> Tensor:
        return passes(list(inputs))

    def release(self) -> None:
        """There are no graphs."""
