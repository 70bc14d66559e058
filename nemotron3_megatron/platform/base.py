"""The one interface to the machine."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import torch

Spec = Literal["torch", "te"]
"""Module implementations: pure torch, or Transformer Engine with mamba-ssm."""


class Platform(Protocol):
    """A kind of device, its collective backend and what Megatron-Core must be told about it."""

    @property
    def name(self) -> Literal["cpu", "cuda"]:
        """Kind of device."""

    @property
    def device(self) -> torch.device:
        """Where this rank's tensors live; on CUDA the rank's own GPU once ``start`` was called."""

    @property
    def collective_backend(self) -> Literal["gloo", "nccl"]:
        """Backend for ``torch.distributed.init_process_group``."""

    @property
    def default_spec(self) -> Spec:
        """Fastest module implementation whose packages are installed."""

    @property
    def peak_flops(self) -> float | None:
        """BF16 operations a second of this rank's device, as published, without sparsity; None where unknown."""

    def start(self, local_rank: int) -> None:
        """Claim this rank's share of the node; call once, before process groups and tensors exist.

        Raises:
            UserError: the node has no device for ``local_rank``.
        """

    def megatron_flags(self, spec: Spec | None = None) -> dict[str, object]:
        """TransformerConfig fields that the device and ``spec`` (None: the default one) impose.

        Raises:
            UserError: ``spec`` needs packages or a device that are not there.
        """

    def synchronize(self) -> None:
        """Wait until all work given to the device is done."""

    def peak_memory_bytes(self) -> int:
        """Most memory held so far: device memory on CUDA, resident memory of the process on CPU."""

    def describe(self) -> str:
        """One line for the start of a log."""


def core_count() -> int:
    """Cores this process may run on."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def cores_per_rank() -> int:
    """Cores for each of this node's ranks, under torchrun; at least 1."""
    return max(1, core_count() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
