"""What ``torch.cuda`` means inside Megatron-Core on a machine without CUDA.

Every ``torch.cuda`` in Megatron's source is this module instead (see :mod:`.rewrite`). A name that is not
defined here is torch.cuda's own, so ``is_available()`` stays False and unforeseen calls fail as they would.
There are no streams: work is done when a call returns, so waiting is a no-op.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch


def current_device(*_: object) -> torch.device:
    """CPU; or torch's default device, so that a model built under ``torch.device("meta")`` stays there."""
    return torch.get_default_device()


def set_device(device: object) -> None:
    """There is one device."""


def device_count() -> int:
    """Number of devices a rank sees."""
    return 1


def resident(value: Any, *_: object, **__: object) -> Any:
    """``value.cuda(...)``: tensors and modules are where they belong already."""
    return value


def type_name(value: Any) -> str:
    """``value.type()`` as a tensor on CUDA names it: ``torch.cuda.FloatTensor``.

    Megatron compares these strings; torch calls the same types ``torch.FloatTensor`` on CPU and
    ``torch.meta.FloatTensor`` on meta.
    """
    name: str = value.type()
    return f"torch.cuda.{name.rpartition('.')[2]}" if isinstance(value, torch.Tensor) else name


def compile_nothing(function: Callable[..., Any] | None = None, **_: object) -> Any:
    """``torch.compile`` without compiling, as function, decorator or decorator with options.

    Compiling works on CPU but costs half a minute at the first step and again at each new shape.
    """
    return function if function is not None else compile_nothing


def synchronize(*_: object) -> None:
    """Nothing is pending."""


def empty_cache() -> None:
    """There is no caching allocator."""


def is_current_stream_capturing() -> bool:
    """There are no CUDA graphs."""
    return False


def manual_seed(seed: int) -> None:
    """The device's generator is the CPU's."""
    torch.default_generator.manual_seed(seed)


def get_rng_state(device: object = None) -> torch.Tensor:
    """State of the device's generator, which is the CPU's."""
    return torch.get_rng_state()


def set_rng_state(state: torch.Tensor, device: object = None) -> None:
    """Set the state of the device's generator, which is the CPU's."""
    torch.set_rng_state(state)


class Event:
    """An event that has always happened."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def record(self, *_: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Event) -> float:
        return 0.0


class Stream:
    """A stream without a queue."""

    cuda_stream = 0

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait_stream(self, stream: Stream) -> None: ...

    def wait_event(self, event: Event) -> None: ...

    def record_event(self, event: Event | None = None) -> Event:
        return event or Event()

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return (0, 0)


def current_stream(*_: object) -> Stream:
    """A stream; all are alike."""
    return Stream()


default_stream = current_stream


def stream(_: object = None) -> contextlib.AbstractContextManager[None]:
    """Work runs at once whichever stream is chosen."""
    return contextlib.nullcontext()


def __getattr__(name: str) -> Any:
    return getattr(torch.cuda, name)
