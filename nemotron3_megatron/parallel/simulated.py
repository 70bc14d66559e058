"""One rank of a world that does not exist: real process groups and modules, tensors without storage.

torch's ``fake`` backend finishes every collective at once and moves nothing; on the ``meta`` device a tensor has its
shape and type only. A rank of thousands then fits into one process on a CPU, and the code that runs is the code that
trains. What nothing can know here is values: see :class:`AnswersReads` and :func:`route_evenly`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from torch import Tensor, nn
from torch._C._distributed_c10d import FakeWork
from torch.overrides import _get_current_function_mode_stack
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import TorchDispatchMode

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import cuda_on_cpu
from nemotron3_megatron.platform.cpu import CpuPlatform, open_platform

_META = torch.device("meta")


class SimulatedPlatform(CpuPlatform):
    """The CPU platform, whose tensors have no storage."""

    @property
    def device(self) -> torch.device:
        """``meta``."""
        return _META


@contextmanager
def simulated_world(run: Run, rank: int) -> Iterator[tuple[SimulatedPlatform, ProcessGroupCollection]]:
    """Be rank ``rank`` of the run's world: its groups exist, and tensors made inside have no storage.

    Raises:
        UserError: the world has no such rank, or CUDA is visible (Megatron-Core is then imported for CUDA).
    """
    world_size = run.layout.world_size
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank}", why=f"the world has ranks 0 to {world_size - 1}")
    open_platform()
    platform = SimulatedPlatform()
    torch.distributed.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        groups = start_groups(run, platform)
        with _megatrons_globals_come_back(), _META, _current_device_is_meta():
            yield platform, groups
    finally:
        stop_groups()


@contextmanager
def _megatrons_globals_come_back() -> Iterator[None]:
    """The tensors that Megatron-Core keeps for a process: without values they would end the next model's passes."""
    scaled = (MoEAuxLossAutoScaler, MTPLossAutoScaler)
    before = [each.main_loss_backward_scale for each in scaled]
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # else it is written into
    try:
        yield
    finally:
        destroy_moe_metrics_tracker()
        for each, scale in zip(scaled, before, strict=True):
            each.main_loss_backward_scale = scale


@contextmanager
def _current_device_is_meta() -> Iterator[None]:
    """Also where torch has left the context of its default device: in a backward pass inside a backward pass."""
    ordinary = cuda_on_cpu.current_device

    def current_device(*_: object) -> torch.device:
        contexts = [mode for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)]
        return contexts[-1].device if contexts else _META

    cuda_on_cpu.current_device = current_device
    try:
        yield
    finally:
        cuda_on_cpu.current_device = ordinary


class AnswersReads(TorchDispatchMode):
    """Answers what a step asks tensors without storage: each of their elements reads as one.

    A norm of one is finite, a sum of losses over a count of tokens is one: a step takes the way of a healthy one.
    Collectives over several tensors at once, which torch does not know on ``meta``, finish like all others.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = 0
        """Tensors that were read so far."""

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            self.reads += 1
            return torch.ones((), dtype=args[0].dtype, device="cpu").item()
        if func is torch.ops.aten._to_copy.default and args[0].is_meta and _is_cpu(options.get("device")):
            self.reads += 1
            return torch.ones(args[0].shape, dtype=options.get("dtype") or args[0].dtype, device="cpu")
        if func.namespace == "c10d" and "coalesced" in func.__name__:
            return FakeWork().boxed()
        return func(*args, **options)


def _is_cpu(device: torch.device | str | None) -> bool:
    return device is not None and torch.device(device).type == "cpu"


def route_evenly(chunks: Sequence[nn.Module], topk: int) -> None:
    """Let every expert receive the same number of tokens (or one more), on every rank.

    Routers still compute on tensors without storage; only the counts, by which tokens are split and sent, are real.

    Args:
        chunks: models with MoE layers of the ``alltoall`` or ``allgather`` dispatcher.
        topk: experts that a token chooses.
    """
    for chunk in chunks:
        for module in chunk.modules():
            dispatcher: Any = getattr(module, "token_dispatcher", None)
            if hasattr(dispatcher, "count_rows"):  # of model/gathered.py
                dispatcher.count_rows = partial(_count_evenly, dispatcher.ep_size, topk)
            elif dispatcher is not None:
                dispatcher.preprocess = partial(_preprocess_evenly, dispatcher.preprocess, topk)


def _count_evenly(ranks: int, topk: int, routes: Tensor) -> tuple[Tensor, Callable[[], int]]:
    rows, experts = routes.shape[0] * topk // ranks, routes.shape[1]
    counts = torch.full((experts,), rows // experts, device="cpu")
    counts[: rows % experts] += 1
    return counts, lambda: rows


def _preprocess_evenly(preprocess: Callable[[Tensor], Tensor], topk: int, routing_map: Tensor) -> Tensor:
    with torch.device("cpu"):
        return preprocess(_even_routes(*routing_map.shape, topk))


@lru_cache(maxsize=4)
def _even_routes(tokens: int, experts: int, topk: int) -> Tensor:
    """(tokens, experts) bool: token i chooses the ``topk`` experts from i * topk on, around the end."""
    distance = torch.arange(experts, dtype=torch.int32) - topk * torch.arange(tokens, dtype=torch.int32)[:, None]
    return distance.remainder_(experts) < topk
