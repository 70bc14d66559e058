"""Memory that the training process and its checkpoint worker share: tensors wait in it until they are on disk."""

from __future__ import annotations

import io
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch

_ALIGNMENT = 64
"""Bytes: a multiple of every element's size, and a cache line."""


@dataclass(frozen=True, slots=True)
class Staged:
    """Where a tensor lies in the memory."""

    start: int
    bytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]


class Staging:
    """Anonymous shared memory that grows as needed and is reused by every save.

    It belongs to no name: it vanishes with the processes, however they die. With a GPU it is page-locked, so that
    copies into it run at the speed of the bus.
    """

    def __init__(self, descriptor: int | None = None) -> None:
        """Create memory, or map that of another process by its ``descriptor``."""
        self._created = descriptor is None
        self.descriptor = os.memfd_create("checkpoint") if descriptor is None else descriptor
        self._memory: torch.Tensor | None = None

    def reserve(self, size: int) -> None:
        """Make room for ``size`` bytes (page-locked where there is a GPU)."""
        if self._memory is None or self._memory.numel() < size:
            self._unlock()
            os.ftruncate(self.descriptor, size)
            self._memory = _mapped(self.descriptor, size)
            if self._created and torch.cuda.is_available():
                outcome = torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), size, 0)
                torch.cuda.check_error(int(outcome))

    def put(self, data: Sequence[torch.Tensor | io.BytesIO]) -> list[Staged | bytes]:
        """Copy tensors in; returns where they are. Objects pass through as bytes. Done when it returns."""
        places: list[Staged | bytes] = []
        end = 0
        for value in data:
            if isinstance(value, io.BytesIO):
                places.append(value.getvalue())
                continue
            end = -(-end // _ALIGNMENT) * _ALIGNMENT
            places.append(Staged(end, value.numel() * value.element_size(), value.dtype, tuple(value.shape)))
            end += value.numel() * value.element_size()
        self.reserve(max(end, 1))
        for value, place in zip(data, places, strict=True):
            if isinstance(place, Staged):
                assert isinstance(value, torch.Tensor)
                self.get(place).copy_(value.detach(), non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return places

    def get(self, place: Staged) -> torch.Tensor:
        """The tensor at ``place``, without a copy."""
        end = place.start + place.bytes
        if self._memory is None or self._memory.numel() < end:
            self._memory = _mapped(self.descriptor, os.fstat(self.descriptor).st_size)
        return self._memory[place.start : end].view(place.dtype).view(place.shape)

    def close(self) -> None:
        """Give the memory back (tensors handed out by :meth:`get` keep theirs)."""
        self._unlock()
        self._memory = None
        os.close(self.descriptor)

    def _unlock(self) -> None:
        if self._created and self._memory is not None and torch.cuda.is_available():
            torch.cuda.check_error(int(torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())))


def room(data: Sequence[torch.Tensor | io.BytesIO]) -> int:
    """Bytes that the tensors of ``data`` need, one behind the other."""
    return sum(value.numel() * value.element_size() + _ALIGNMENT for value in data if isinstance(value, torch.Tensor))


def _mapped(descriptor: int, size: int) -> torch.Tensor:
    """uint8 tensor over all of the memory."""
    return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
