"""Adam's state between Megatron-Core's optimizers and a checkpoint that any layout can read.

What is stored is the same for every optimizer, layout and world size: for each model parameter with
checkpoint key K the FP32 tensors ``optimizer.state.{param,exp_avg,exp_avg_sq}.K`` in the parameter's
own (global) shape, and one number for the whole model, the optimizer step.

Megatron-Core is exercised upstream with the FusedAdam of Transformer Engine or Apex, which count steps in
the parameter groups, and with models of one dtype. The checkpoint path of 0.19.2 has these defects. The first
five appear with torch's Adam, which counts steps in one tensor per parameter; 6 and 7 in a BF16 model that keeps
some parameters in FP32 (A_log, D, dt_bias, router), whatever the Adam; 8 with any. Each is repaired in one place:

1. no state before the first step ................ :func:`allocate_state`
2. ``KeyError: 'step'`` while loading ............ :func:`sharded_state` (tensors are read into place by name)
3. all parameters share one step tensor .......... :func:`set_step`
4. dense and expert optimizers nest differently .. :func:`sharded_state` (tensors only, keyed by parameter)
5. prefixes of plain chained optimizers .......... :func:`sharded_state` (the same)
6. distributed optimizer: parameters mixed up .... :func:`correct_places`
7. plain BF16 optimizer: parameters mixed up ..... :func:`_plain_state`
8. several gradient buckets: state shifted ....... :func:`_distributed_state` (shards are stored where they lie)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer, MegatronOptimizer

from nemotron3_megatron.checkpoint import boxes

PREFIX = "optimizer.state"
"""Checkpoint keys of optimizer tensors begin with this (Megatron-Core's own choice)."""

_MOMENTS = ("exp_avg", "exp_avg_sq")
_TORCH_ADAM = (torch.optim.Adam, torch.optim.AdamW)

_Stored = tuple[torch.nn.Parameter, int, dict[str, torch.Tensor]]
"""A model parameter, the first element of it that is stored here, and the FP32 tensors from there on."""


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


def weights_from_masters(optimizer: MegatronOptimizer) -> None:
    """Make the model's weights, on every rank, those that the optimizer holds in FP32. A collective.

    For a checkpoint of another dtype: the weights in it have been rounded to BF16, or are about to be.
    """
    for part in parts(optimizer):
        if not isinstance(part, FP32Optimizer):
            part._copy_main_params_to_model_params()
        if isinstance(part, DistributedOptimizer):
            for chunk in part.model_chunks:
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
    get its master weights and silently lose both moments. (Ours, too, needs tensors to read into.)
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


def sharded_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> list[ShardedTensor]:
    """The optimizer's live FP32 tensors on this rank, to be saved from or loaded into, in place.

    A distributed optimizer gives its own shard, cut into boxes (:mod:`.boxes`): nothing is gathered and nothing
    copied, whatever the number of data-parallel ranks. Repairs optimizer/optimizer.py:1547-1566, where a chain of
    one (EP=1) nests its non-tensor part differently from a chain of two (EP>1), so that EP2 -> EP1 fails with
    ``KeyError: 'optimizer'``, and :1551-1556, where plain optimizers get ``chained_N.`` prefixes that depend
    on the number of optimizers in the chain.

    Args:
        optimizer: after :func:`prepare`.
        model: sharded state dict of the model whose values hold the live parameters.

    Raises:
        TypeError: an optimizer this module does not know how to store.
    """
    entries = {id(entry.data): entry for entry in nested_values(model) if entry.data is not None}
    found = []
    for part in parts(optimizer):
        distributed = isinstance(part, DistributedOptimizer)
        for parameter, start, tensors in _distributed_state(part) if distributed else _plain_state(part):
            cut = boxes.pieces(entries[id(parameter)])
            for name, tensor in tensors.items():
                found += boxes.sharded(cut, f"{PREFIX}.{name}", start, tensor.detach().view(-1), alone=distributed)
    return found


def _distributed_state(part: DistributedOptimizer) -> Iterator[_Stored]:
    """Of this rank's shards, as they are.

    Repairs optimizer/distrib_optimizer.py:1757-1786 (``fully_reshardable``), which gathers the state of all
    data-parallel ranks on each of them and then looks a parameter up at its offset in the gradient buffer, while the
    gathered tensors have no padding between buckets (:1397): behind a padded bucket (overlapped reduction, or MTP
    under pipeline parallelism, where the embedding has a bucket of its own) all state is saved shifted, silently.
    """
    for by_type in part.gbuf_ranges:
        for buckets in by_type.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    live, own = part._get_main_param_and_optimizer_states(parameter), ranges["param"]
                    if live["param"].numel() != own.size:
                        raise RuntimeError(f"the optimizer holds {live['param'].numel()} of {own.size} elements")
                    yield parameter, own.start, {name: live[name] for name in ("param", *_MOMENTS)}


def _plain_state(part: MegatronOptimizer) -> Iterator[_Stored]:
    """Of a non-distributed optimizer: every parameter whole.

    Repairs optimizer/optimizer.py:1148, where the BF16 optimizer numbers only its BF16 parameters but looks
    them up by their place among all: with FP32 parameters in between state is stored under the wrong
    parameter, or fails on its shape.
    """
    for parameter, main in _plain_parameters(part):
        yield parameter, 0, {"param": main, **{name: part.optimizer.state[main][name] for name in _MOMENTS}}


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
