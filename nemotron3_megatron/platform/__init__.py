"""What differs between a CPU and a CUDA machine; nothing outside this package asks which one it is on."""

from __future__ import annotations

from typing import Literal

from nemotron3_megatron.platform.base import Platform

__all__ = ["Platform", "select"]


def select(device: Literal["auto", "cpu", "cuda"] = "auto") -> Platform:
    """The platform to run on; ``auto`` takes CUDA where there is a usable GPU.

    Raises:
        UserError: ``cuda`` without a usable GPU, or ``cpu`` where CUDA is visible.
    """
    # Imported here so that `import nemotron3_megatron` stays free of torch.
    from nemotron3_megatron.platform import cpu, cuda

    if device == "cpu" or (device == "auto" and not cuda.is_usable()):
        return cpu.open_platform()
    return cuda.open_platform()
