"""The optimizer: Megatron-Core's DDP and (distributed) AdamW, and an update that refuses non-finite gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer.param_layout import FullParamLayout
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import nn

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.model.transformer_config import DTYPES
from nemotron3_megatron.train.trainable import FROZEN, drop_frozen_gradients, freeze, global_names
from nemotron3_megatron.train.updates import Updates


@dataclass(frozen=True, slots=True)
class Update:
    """What an optimizer step did."""

    applied: bool
    grad_norm: float
    non_finite: tuple[str, ...] = ()
    """Global names of the parameters whose gradients stopped the update."""
    reason: str = ""
    """Why an update with finite gradients was refused."""


def wrap_data_parallel(
    chunks: list[Nemotron3Model], run: Run, groups: ProcessGroupCollection
) -> list[DistributedDataParallel]:
    """Megatron-Core's DDP around every chunk: FP32 gradient accumulation and reduction, always.

    (BF16 accumulation in the output layer caused Ultra's first divergence; Ultra report, stability section.)
    """
    parallel = run.parallel
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=parallel.distributed_optimizer,
        overlap_grad_reduce=parallel.overlap_grad_reduce,
        overlap_param_gather=parallel.overlap_param_gather,
        # Our own update looks at every gradient and skips the step instead of raising on one rank.
        check_for_nan_in_grad=False,
    )
    freeze(chunks, run.trainable)
    with _side_stream():
        model = [
            DistributedDataParallel(
                chunk.config,
                config,
                chunk,
                # One bucket group a buffer: gloo corrupts a coalesced gather of buffers of different types.
                disable_bucketing=False,
                pg_collection=groups,
                full_param_layout=_parameter_layout(chunk, config, groups),
            )
            for chunk in chunks
        ]
    if parallel.overlap_grad_reduce:
        for wrapped in model:
            _let_experts_announce(wrapped)
    return model


def _let_experts_announce(wrapped: DistributedDataParallel) -> None:
    """See ``DeviceCountsLinear.announce``."""

    def announce(weights: Sequence[nn.Parameter]) -> None:
        for weight in weights:
            wrapped.param_to_bucket_group[weight].register_grad_ready(weight, wrapped.force_all_reduce)

    for module in wrapped.modules():
        if hasattr(module, "announce"):
            module.announce = announce


@contextmanager
def _side_stream() -> Iterator[None]:
    """The stream that DDP's gradient hooks will belong to: a CUDA graph cannot wait for the default one."""
    if not torch.cuda.is_available():
        yield
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


def _parameter_layout(
    chunk: Nemotron3Model, config: DistributedDataParallelConfig, groups: ProcessGroupCollection
) -> FullParamLayout | None:
    """Where each parameter lies in the distributed optimizer's buffers, by the rules DDP itself applies."""
    if not config.use_distributed_optimizer:
        return None
    size = groups.dp_cp.size()
    overlapped_first_stage = config.overlap_grad_reduce and groups.pp.rank() == 0
    return DistributedOptimizer.compute_full_param_layout(
        [p for p in chunk.parameters() if p.requires_grad],
        max(40_000_000, 1_000_000 * size) if overlapped_first_stage else None,
        size,
        config,
        expert_data_parallel_world_size=groups.expt_dp.size(),
    )


def build_optimizer(
    model: list[DistributedDataParallel], run: Run, groups: ProcessGroupCollection
) -> MegatronOptimizer:
    """AdamW with FP32 master weights and moments; no weight decay on norms, biases and vectors.

    The learning rate is set before every update by the loop.
    """
    options = run.optimizer
    dtype = DTYPES[run.precision.dtype]
    config = OptimizerConfig(
        optimizer="adam",
        lr=options.lr,
        min_lr=options.min_lr,
        weight_decay=options.weight_decay,
        adam_beta1=options.adam_beta1,
        adam_beta2=options.adam_beta2,
        adam_eps=options.adam_eps,
        clip_grad=options.clip_grad,
        bf16=dtype is torch.bfloat16,
        params_dtype=dtype,
        use_distributed_optimizer=run.parallel.distributed_optimizer,
        overlap_param_gather=run.parallel.overlap_param_gather,
    )
    overrides = {**get_standard_config_overrides(config), ParamKey(attr=FROZEN): {"lr_mult": 0.0}}
    optimizer: MegatronOptimizer = get_megatron_optimizer(
        config, model, overrides, use_gloo_process_groups=False, pg_collection=groups
    )
    for group in optimizer.param_groups:
        # Megatron-Core marks the groups without decay and leaves it to its own scheduler to heed the mark.
        group["weight_decay"] = options.weight_decay * group["wd_mult"]
    return optimizer


def set_learning_rate(optimizer: MegatronOptimizer, lr: float) -> None:
    """Use ``lr`` in the next update, in every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_mult", 1.0)


def update(
    updates: Updates,
    model: list[DistributedDataParallel],
    clip_grad: float,
    refuse: Callable[[], str] | None = None,
) -> Update:
    """Clip and apply the gradients, or leave weights and moments untouched when any gradient is not finite.

    All ranks decide alike: the norm is computed over all of them, and ``refuse``, which may give a reason to leave
    weights alone although gradients are finite, must answer alike.
    """
    drop_frozen_gradients(model)
    norm = updates.norm()
    if not math.isfinite(norm):
        return Update(False, norm, _non_finite_parameters(model))
    if reason := refuse() if refuse is not None else "":
        return Update(False, norm, reason=reason)
    if clip_grad > 0:
        updates.clip(norm, clip_grad)
    updates.apply()
    return Update(True, norm)


def _non_finite_parameters(model: list[DistributedDataParallel]) -> tuple[str, ...]:
    """Names of parameters with a non-finite gradient on any rank."""
    mine = [name for wrapped in model for name in _non_finite_in(wrapped.module)]
    everyone: list[list[str]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(everyone, mine)
    return tuple(sorted({name for names in everyone for name in names}))


def _non_finite_in(chunk: Nemotron3Model) -> list[str]:
    names = global_names(chunk)
    return [
        names.get(id(parameter), name)
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and not torch.isfinite(parameter.main_grad).all()
    ]
