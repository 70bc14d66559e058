"""What has to be changed in single Megatron-Core modules after they were rewritten for CPU.

One function a module, named in ``_AMENDMENTS``, run once after the module's own code.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any

import torch


def apply(module: ModuleType) -> None:
    """Amend ``module`` if it is listed."""
    amend = _AMENDMENTS.get(module.__name__)
    if amend is not None:
        amend(module)


def _use_cpu_generator(random: ModuleType) -> None:
    """``tensor_parallel.random`` reads and writes the device's generator through torch's C interface of CUDA."""

    def get_state(device: object = None, clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return torch.get_rng_state()

    def set_state(new_state: torch.Tensor, device: object = -1, graph_safe: bool = False) -> None:
        torch.set_rng_state(new_state)

    _replace(random, "_get_cuda_rng_state", get_state)
    _replace(random, "_set_cuda_rng_state", set_state)
    # The tracker warns when the CPU generator moves while the device's is forked: here they are the same one.
    logging.getLogger(random.__name__).addFilter(
        lambda record: record.msg != "CPU RNG state changed within GPU RNG context"
    )


def _give_numpy_from_cpu_tensors(moe_utils: ModuleType) -> None:
    """The token dispatcher needs its split sizes as lists; Megatron only converts tensors that were on CUDA."""

    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    _replace(moe_utils, "maybe_move_tensor_to_cpu", maybe_move_tensor_to_cpu)


def _replace(module: ModuleType, name: str, value: object) -> None:
    if not hasattr(module, name):
        raise ImportError(f"{module.__name__} has no {name}: this version of Megatron-Core is not supported on CPU")
    setattr(module, name, value)


_AMENDMENTS: Mapping[str, Callable[[ModuleType], None]] = MappingProxyType(
    {
        "megatron.core.tensor_parallel.random": _use_cpu_generator,
        "megatron.core.transformer.moe.moe_utils": _give_numpy_from_cpu_tensors,
    }
)
