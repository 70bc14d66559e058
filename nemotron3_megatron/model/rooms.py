"""Whether captured passes had room for all rows that their experts got.

A CUDA graph holds the sizes of its tensors. How many rows a rank's experts get (``gathered.py``) changes with every
batch, so a graph has room for some more than before; a step that needed still more is computed again without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemotron3_megatron.model.gathered import GatherDispatcher


@dataclass(frozen=True, slots=True)
class Rooms:
    """Of all expert layers of a rank that are sent every token of their group."""

    dispatchers: tuple[GatherDispatcher, ...] = ()

    def watch(self) -> None:
        """Forget earlier passes."""
        if crowds := self._crowds():
            torch._foreach_zero_(crowds)

    def crowded(self, device: torch.device) -> Tensor:
        """(1,) float32: layers that got more rows than room in a captured pass since :meth:`watch`."""
        crowds = self._crowds()
        if not crowds:
            return torch.zeros(1, device=device)
        return torch.stack(crowds)[:, :1].sum(dim=0).float()

    def widen(self) -> None:
        """Have room for as many rows as there were, and for more of them in every layer, lest each lacks some in turn.
        Waits for the GPU."""
        for dispatcher in self.dispatchers:
            if dispatcher.crowd is not None:
                dispatcher.learn(int(dispatcher.crowd[1]))
            dispatcher.forecast.widen()

    def _crowds(self) -> list[Tensor]:
        return [each.crowd for each in self.dispatchers if each.crowd is not None]


def rooms_of(chunks: Sequence[nn.Module]) -> Rooms:
    """Those of a rank's model chunks."""
    dispatchers = (getattr(module, "token_dispatcher", None) for chunk in chunks for module in chunk.modules())
    return Rooms(tuple(each for each in dispatchers if isinstance(each, GatherDispatcher)))
