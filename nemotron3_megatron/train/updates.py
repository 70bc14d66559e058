"""How reduced gradients become weights: by Megatron-Core's optimizer, or by the same kernels over a few long tensors.

Megatron-Core's distributed AdamW walks all parameters in Python six times an update: to forget gradients, to hand them
over, for their norm, to clip, for Adam, to copy master weights; and its kernels are handed thousands of small tensors
(an expert's weight is one). A GPU waits for that longer than it computes. But gradients and weights lie one behind the
other in DDP's buffers. Here masters and moments do, too, so that an update is a call for each piece of the buffers
whose parameters share their settings, and Transformer Engine's Adam writes the BF16 weights itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from nemotron3_megatron.checkpoint.adam import parts as parts_of

_MOST_ELEMENTS = 2**30
"""Of one tensor: the kernels count elements in 32 bits."""
_CHUNK_ELEMENTS = 2048 * 32
"""That a block of threads works on (Transformer Engine ``multi_tensor_apply.py``)."""
NORM_EPSILON = 1e-6
"""Added to the norm that gradients are divided by (Megatron-Core ``clip_grads.py``)."""


class Updates(Protocol):
    """One update: ``forget``, the passes, ``norm``, then ``clip`` and ``apply`` or neither."""

    def forget(self) -> None:
        """Let go of the last update's gradients (DDP's buffers are zeroed elsewhere)."""

    def norm(self) -> float:
        """L2 norm of all reduced gradients, over all ranks. A collective."""

    def clip(self, norm: float, most: float) -> None:
        """Scale the gradients, of norm ``norm``, down to a norm of ``most``."""

    def apply(self) -> None:
        """Move the weights, and start gathering them where they are sharded."""


class MegatronUpdates:
    """Megatron-Core's own."""

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        self._optimizer = optimizer

    def forget(self) -> None:
        self._optimizer.zero_grad()

    def norm(self) -> float:
        self._optimizer.prepare_grads()
        return float(self._optimizer.get_grad_norm())

    def clip(self, norm: float, most: float) -> None:
        clip_grad_by_total_norm_fp32(self._optimizer.get_parameters(), most, norm)

    def apply(self) -> None:
        self._optimizer.step_with_ready_grads()


class Kernels(Protocol):
    """Operations on many FP32 tensors at once."""

    def scale(self, tensors: list[Tensor], factor: float) -> None:
        """In place."""

    def adam(self, lists: list[list[Tensor]], group: dict[str, Any]) -> None:
        """AdamW in place, with the settings of a parameter group.

        ``lists``: gradients, weights, first and second moments, and where weights are BF16 their FP32 masters.
        """


class TransformerEngineKernels:
    """Transformer Engine's, on CUDA."""

    def __init__(self) -> None:
        import transformer_engine_torch

        self._kernels = transformer_engine_torch
        self._overflow = torch.zeros(1, dtype=torch.int, device="cuda")  # wanted by its kernels, unused here

    def scale(self, tensors: list[Tensor], factor: float) -> None:
        self._kernels.multi_tensor_scale(_CHUNK_ELEMENTS, self._overflow, [tensors, tensors], factor)

    def adam(self, lists: list[list[Tensor]], group: dict[str, Any]) -> None:
        rates = (group["lr"], *group["betas"], group["eps"])
        decoupled_decay, bias_correction = 1, 1
        self._kernels.multi_tensor_adam(
            _CHUNK_ELEMENTS,
            self._overflow,
            lists,
            *rates,
            group["step"],
            decoupled_decay,
            bias_correction,
            group["weight_decay"],
        )


class PreparedUpdates:
    """The update of distributed optimizers that accumulate FP32 gradients."""

    def __init__(self, optimizer: MegatronOptimizer, kernels: Kernels) -> None:
        self._optimizer, self._kernels = optimizer, kernels
        self._prepare()

    def forget(self) -> None:
        """Nothing: gradients are views of DDP's buffers."""

    def norm(self) -> float:
        if any(part.optimizer.state[p]["exp_avg"] is not m for part, p, m in self._evidence):
            self._prepare()  # somebody gave the optimizer other tensors
        return float(get_grad_norm_fp32(self._counted, grad_stats_parallel_group=self._group))

    def clip(self, norm: float, most: float) -> None:
        factor = most / (norm + NORM_EPSILON)
        if factor < 1.0:
            for _, (gradients, *_) in self._calls:
                self._kernels.scale(gradients, factor)

    def apply(self) -> None:
        for part in self._parts:
            for group in part.optimizer.param_groups:
                group["step"] = group.get("step", 0) + 1
        for group, lists in self._calls:
            self._kernels.adam(lists, group)
        for part in self._parts:
            if not part.ddp_config.overlap_param_gather:
                part.start_param_sync_for_bucket_group_subset()

    def _prepare(self) -> None:
        self._parts = parts_of(self._optimizer)
        for part in self._parts:
            part.prepare_grads()
        self._group = self._optimizer.get_grad_stats_parallel_group()
        counted = [(gradient,) for part in self._parts for gradient in part.get_grads_for_grad_norm()]
        self._counted = [_joined([gradient for (gradient,) in run]) for run in _runs(counted)]
        self._calls = [call for part in self._parts for call in _calls(part)]
        self._evidence = [
            (part, parameter, part.optimizer.state[parameter]["exp_avg"])
            for part in self._parts
            for group in part.optimizer.param_groups
            for parameter in group["params"][:1] + group["params"][-1:]
        ]


def choose_updates(optimizer: MegatronOptimizer) -> Updates:
    """Prepared lists where everything is as they need it.

    That is: CUDA, Transformer Engine's Adam, sharded FP32 state, one group for the norms of dense and expert gradients.
    """
    try:
        from transformer_engine.pytorch.optimizers import FusedAdam
    except ImportError:
        return MegatronUpdates(optimizer)
    parts = parts_of(optimizer)
    fits = all(
        isinstance(part, DistributedOptimizer)
        and isinstance(part.optimizer, FusedAdam)
        and part.optimizer.adam_w_mode
        and not part.config.use_precision_aware_optimizer
        for part in parts
    )
    one_norm = not hasattr(optimizer, "chained_optimizers") or optimizer.grads_states_parallel_group_is_shared()
    if not (parts and fits and one_norm and torch.cuda.is_available()):
        return MegatronUpdates(optimizer)
    return PreparedUpdates(optimizer, TransformerEngineKernels())


def _calls(part: DistributedOptimizer) -> Iterator[tuple[dict[str, Any], list[list[Tensor]]]]:
    """For each parameter group, and in it for BF16 and FP32 weights: the group, and lists for :meth:`Kernels.adam`."""
    halves = {
        id(master): _shard(part, parameter)
        for masters, parameters in zip(part.shard_fp32_from_float16_groups, part.model_float16_groups, strict=True)
        for master, parameter in zip(masters, parameters, strict=True)
    }
    for group in part.optimizer.param_groups:
        for has_master in (False, True):
            rows = [
                (p.grad, halves.get(id(p), p.detach()), p)
                for p in group["params"]
                if p.numel() and (id(p) in halves) is has_master
            ]
            runs = [_flattened(part, run, has_master=has_master) for run in _runs(rows, of=2)]
            if runs:
                yield group, [list(column) for column in zip(*runs, strict=True)]


def _shard(part: DistributedOptimizer, parameter: torch.nn.Parameter) -> Tensor:
    """This rank's part of a model parameter, where the forward pass (or its gathering) reads it."""
    place = part._get_model_param_range_map(parameter)["gbuf_world_in_bucket"]
    buffer, _, bucket = part.model_param_gbuf_map[parameter]
    whole: Tensor = part.buffers[buffer].buckets[bucket].param_data
    return whole.view(-1)[place.start : place.end]


def _flattened(part: DistributedOptimizer, run: Sequence[tuple[Tensor, ...]], *, has_master: bool) -> list[Tensor]:
    """Gradient, weight, moments, master of a run of parameters as one tensor each.

    Moments and masters move into new tensors, of which the optimizer's become views.
    """
    gradients, weights, parameters = zip(*run, strict=True)
    whole = _joined(gradients)
    moments = {name: torch.zeros_like(whole) for name in ("exp_avg", "exp_avg_sq")}
    masters = torch.empty_like(whole) if has_master else None
    start = 0
    for parameter in parameters:
        piece, state = slice(start, start + parameter.numel()), part.optimizer.state[parameter]
        for name, moment in moments.items():
            if name in state:
                moment[piece].copy_(state[name].flatten())
            state[name] = moment[piece].view_as(parameter)
        if masters is not None:
            masters[piece].copy_(parameter.detach().flatten())
            parameter.data = masters[piece].view_as(parameter)
        start = piece.stop
    return [whole, _joined(weights), *moments.values(), *([] if masters is None else [masters])]


def _runs(rows: Sequence[tuple[Tensor, ...]], of: int = 1) -> Iterator[list[tuple[Tensor, ...]]]:
    """Rows by place, cut wherever one of their first ``of`` tensors does not begin where the row before ends."""
    run: list[tuple[Tensor, ...]] = []
    elements = 0
    for row in sorted(rows, key=lambda row: row[0].data_ptr()):
        follows = run and all(_end(a) == b.data_ptr() for a, b in zip(run[-1][:of], row[:of], strict=True))
        if not follows or elements + row[0].numel() > _MOST_ELEMENTS:
            if run:
                yield run
            run, elements = [], 0
        run.append(row)
        elements += row[0].numel()
    if run:
        yield run


def _end(tensor: Tensor) -> int:
    return tensor.data_ptr() + tensor.numel() * tensor.element_size()


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors that lie one behind the other in one buffer, as one."""
    return tensors[0].detach().as_strided((sum(tensor.numel() for tensor in tensors),), (1,))
