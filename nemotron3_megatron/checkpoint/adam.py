"""Adam's state between Megatron-Core's optimizers and a checkpoint that any layout can read.

What is stored is the same for every optimizer, layout and world size: for each model parameter with
checkpoint key K the FP32 tensors ``optimizer.state.{param,exp_avg,exp_avg_sq}.K`` in the parameter's
own (global) shape, and one number for the whole model, the optimizer step.

Megatron-Core is exercised upstream with the FusedAdam of Transformer Engine or Apex, which count steps in
the parameter groups, and with models of one dtype. The checkpoint path of 0.19.2 has these defects. The first
five appear with torch's Adam, which counts steps in one tensor per parameter; 6 and 7 in a BF16 model that keeps
some parameters in FP32 (A_log, D, dt_bias, router), whatever the Adam; 8 with any. Each is repaired in one place:

1. no state before the first step ................ :func:`allocate_state`
2. ``KeyError: 'step'`` while loading ............ :func:`steps_set_aside`
3. all parameters share one step tensor .......... :func:`set_step`
4. dense and expert optimizers nest differently .. :func:`sharded_state` (tensors only, keyed by parameter)
5. prefixes of plain chained optimizers .......... :func:`sharded_state` (the same)
6. distributed optimizer: parameters mixed up .... :func:`correct_places`
7. plain BF16 optimizer: parameters mixed up ..... :func:`_plain_state`
8. several gradient buckets: state shifted ....... :func:`_distributed_state`
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer

PREFIX = "optimizer.state"
"""Checkpoint keys of optimizer tensors begin with this (Megatron-Core's own choice)."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)


def parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of a chain that own parameters on this rank (dense and expert parameters have one each)."""
    chained = getattr(optimizer, "chained_optimizers", [optimizer])
    return [part for part in chained if not getattr(part, "is_stub_optimizer", False)]


def prepare(optimizer: MegatronOptimizer) -> None:
    """Bring an optimizer, fresh or trained, into the state that saving and loading expect."""
    for part in parts(optimizer):
        if isinstance(part, DistributedOptimizer):
            correct_places(part)
    allocate_state(optimizer)


def gather_weights(optimizer: MegatronOptimizer) -> None:
    """Let every rank hold the weights of the last update. A collective.

    With overlapped gathering those of other ranks' shards otherwise arrive only in the next forward pass.
    """
    wrapped = {
        id(chunk): chunk
        for part in parts(optimizer)
        if isinstance(part, DistributedOptimizer) and part.ddp_config.overlap_param_gather
        for chunk in part.model_chunks
    }
    for chunk in wrapped.values():
        chunk.start_param_sync(force_sync=True)


def correct_places(part: DistributedOptimizer) -> None:
    """Recompute where each model parameter's shard stands in its parameter group.

    Repairs optimizer/distrib_optimizer.py:342, which notes places in the order of gradient buffers (one buffer
    a dtype, in order of first use), while :488 then lists FP32 parameters before BF16 ones. With both dtypes in
    a group state is saved and loaded under other parameters' names: an error where their sizes differ, silent
    where they agree.
    """
    part.model_param_group_index_map = {
        parameter: (group, place)
        for group, (wholes, halves) in enumerate(zip(part.model_fp32_groups, part.model_float16_groups, strict=True))
        for place, parameter in enumerate([*wholes, *halves])
    }


def allocate_state(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its moments (zeros where there are none yet), and torch's Adam its step.

    Repairs optimizer/distrib_optimizer.py:839, where ``state_dict()`` of an optimizer that has not stepped
    fails an assertion, and :1217, where a load fills only state that exists already: a fresh process would
    get its master weights and silently lose both moments.
    """
    step = current_step(optimizer)
    for part in parts(optimizer):
        part.init_state_fn(part.optimizer, part.config)
        if isinstance(part.optimizer, _TORCH_ADAM):
            for group, parameter in _parameters(part.optimizer):
                part.optimizer.state[parameter].setdefault("step", _step_tensor(step, group, parameter))


def current_step(optimizer: MegatronOptimizer) -> int:
    """Updates made so far; 0 before the first.

    Raises:
        RuntimeError: parameters or groups disagree (one step a model is all a checkpoint holds).
    """
    steps = set()
    for part in parts(optimizer):
        steps |= {int(group["step"]) for group in part.optimizer.param_groups if group["params"] and "step" in group}
        steps |= {int(state["step"]) for state in part.optimizer.state.values() if "step" in state}
    if len(steps) > 1:
        raise RuntimeError(f"the optimizer step differs between parameters: {sorted(steps)}")
    return steps.pop() if steps else 0


def set_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Set the number of updates made: in each parameter's own tensor (torch), or in the groups (FusedAdam).

    Repairs optimizer/distrib_optimizer.py:1026-1032, which hands one tensor to all parameters. Every update
    then counts once per parameter, so bias correction is silently wrong after a resume (10 steps after a
    resume at 10 read 1380, the loss 5.5 % off).
    """
    for part in parts(optimizer):
        if isinstance(part.optimizer, _TORCH_ADAM):
            for group, parameter in _parameters(part.optimizer):
                part.optimizer.state[parameter]["step"] = _step_tensor(step, group, parameter)
        else:
            for group in part.optimizer.param_groups:
                group["step"] = step


@contextmanager
def steps_set_aside(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Hide torch's per-parameter steps while tensors are loaded; :func:`set_step` gives new ones afterwards.

    Repairs optimizer/distrib_optimizer.py:1219-1223: the load looks up every tensor of a parameter's state in
    the checkpoint, which has no ``step`` per parameter (``KeyError: 'step'``).
    """
    step = current_step(optimizer)
    for part in parts(optimizer):
        if isinstance(part.optimizer, _TORCH_ADAM):
            for state in part.optimizer.state.values():
                state.pop("step", None)
    try:
        yield
    finally:
        set_step(optimizer, step)


def sharded_state(optimizer: MegatronOptimizer, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
    """The optimizer's tensors as ``ShardedTensor``s (or factories), for saving or as a load template.

    Only tensors, each keyed by its model parameter. Repairs optimizer/optimizer.py:1547-1566, where a chain of
    one (EP=1) nests its non-tensor part differently from a chain of two (EP>1), so that EP2 -> EP1 fails with
    ``KeyError: 'optimizer'``, and :1551-1556, where plain optimizers get ``chained_N.`` prefixes that depend
    on the number of optimizers in the chain.

    Args:
        optimizer: after :func:`prepare`.
        model: sharded state dict of the model whose values hold the live parameters.
        is_loading: True builds empty tensors instead of gathering the real ones.

    Raises:
        TypeError: an optimizer this module does not know how to store.
    """
    states: dict[str, Any] = {}
    entries = {id(entry.data): entry for entry in nested_values(model) if entry.data is not None}
    for index, part in enumerate(parts(optimizer)):
        if isinstance(part, DistributedOptimizer):
            states[str(index)] = _distributed_state(part, entries, is_loading)
        else:
            states[str(index)] = _plain_state(part, entries)
    return states


def load_sharded_state(optimizer: MegatronOptimizer, states: dict[str, Any]) -> None:
    """Copy loaded tensors (structure of :func:`sharded_state`) into the optimizer. Steps are left alone."""
    with torch.no_grad(), steps_set_aside(optimizer):
        for index, part in enumerate(parts(optimizer)):
            loaded = states[str(index)]
            if isinstance(part, DistributedOptimizer):
                part.load_parameter_state_from_fully_reshardable(loaded)
                continue
            for row, (_, main) in enumerate(_plain_parameters(part)):
                main.copy_(loaded[row]["param"])
                for name in _MOMENTS:
                    part.optimizer.state[main][name].copy_(loaded[row][name])


def _distributed_state(part: DistributedOptimizer, entries: dict[int, Any], is_loading: bool) -> dict[int, Any]:
    """Tensors of a distributed optimizer, gathered from the data-parallel ranks.

    Repairs optimizer/distrib_optimizer.py:1757-1786 (``fully_reshardable``), which looks a parameter up at its
    offset in the gradient buffer, while the gathered tensors have no padding between buckets (:1397). Behind a
    padded bucket all state is saved shifted, silently: with overlapped reduction, or with MTP under pipeline
    parallelism, where the embedding has a bucket of its own.
    """
    gathered = part.get_parameter_state_dp_zero(use_gloo_comm=False, empty_data=is_loading, return_on_all_ranks=True)
    states: dict[int, Any] = {}
    for index, buffer in enumerate(part.buffers):
        (whole,) = gathered[index].values()
        starts = list(accumulate((bucket.numel_unpadded for bucket in buffer.buckets), initial=0))
        for parameter, (begin, end, bucket) in buffer.param_index_map.items():
            place = starts[bucket] + begin - buffer.buckets[bucket].offset
            states[len(states)] = _stored(
                entries[id(parameter)],
                {name: whole[name][place : place + end - begin].view(parameter.shape) for name in ("param", *_MOMENTS)},
            )
    return states


def _plain_state(part: MegatronOptimizer, entries: dict[int, Any]) -> dict[int, Any]:
    """Tensors of a non-distributed optimizer under the keys that the distributed one uses.

    Repairs optimizer/optimizer.py:1148, where the BF16 optimizer numbers only its BF16 parameters but looks
    them up by their place among all: with FP32 parameters in between state is stored under the wrong
    parameter, or fails on its shape.
    """
    return {
        row: _stored(
            entries[id(parameter)], {"param": main, **{name: part.optimizer.state[main][name] for name in _MOMENTS}}
        )
        for row, (parameter, main) in enumerate(_plain_parameters(part))
    }


def _stored(entry: Any, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """One parameter's optimizer tensors, sharded as the parameter itself (``entry``) is."""
    return {
        name: make_sharded_optimizer_tensor(entry, tensor.detach(), f"{PREFIX}.{name}")
        for name, tensor in tensors.items()
    }


def _plain_parameters(part: MegatronOptimizer) -> list[tuple[torch.nn.Parameter, torch.Tensor]]:
    """(model parameter, FP32 main parameter) pairs of a non-distributed optimizer; FP32 ones are their own."""
    if isinstance(part, FP32Optimizer):
        return [(parameter, parameter) for _, parameter in _parameters(part.optimizer)]
    if isinstance(part, Float16OptimizerWithFloat16Params):
        pairs = []
        for halves, mains, wholes in zip(
            part.float16_groups, part.fp32_from_float16_groups, part.fp32_from_fp32_groups, strict=True
        ):
            pairs += [*zip(halves, mains, strict=True), *zip(wholes, wholes, strict=True)]
        return pairs
    raise TypeError(f"cannot store the state of {type(part).__name__}")


def _parameters(inner: torch.optim.Optimizer) -> Iterator[tuple[dict[str, Any], torch.nn.Parameter]]:
    """(group, parameter) of a torch optimizer."""
    return ((group, parameter) for group in inner.param_groups for parameter in group["params"])


def _step_tensor(step: int, group: dict[str, Any], parameter: torch.Tensor) -> torch.Tensor:
    """A step counter of one parameter's own; torch wants it beside the parameter only for these two variants."""
    beside = group.get("capturable") or group.get("fused")
    return torch.tensor(float(step), dtype=torch.float32, device=parameter.device if beside else "cpu")
