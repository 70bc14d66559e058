"""Copies between CPU and GPU that neither waits for: the CPU goes on launching while the GPU computes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def read_later(x: Tensor) -> Callable[[], Tensor]:
    """Start copying ``x`` to the CPU; the function returned waits for the copy, not for what was launched after it."""
    copy = x.detach().to("cpu", non_blocking=True)
    if not x.is_cuda:
        return lambda: copy
    copied = torch.cuda.Event()
    copied.record()

    def read() -> Tensor:
        copied.synchronize()
        return copy

    return read


def send(x: Tensor, device: torch.device) -> Tensor:
    """A copy of ``x`` on ``device``; from CPU to GPU out of page-locked memory, or the CPU would wait for the copy."""
    if device.type != "cuda" or x.is_cuda:
        return x.to(device)
    return x.pin_memory().to(device, non_blocking=True)


def is_capturing() -> bool:
    """Whether what is launched becomes part of a CUDA graph; the CPU cannot wait for any of it."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
