"""What ranks do in test_te_fusion: gradients of one model with and without ``gradient_accumulation_fusion``."""

from __future__ import annotations

import os
from typing import Any

import torch
from te_lowering import lowered
from torch import Tensor

MICRO_BATCHES = 3
STEPS = 2

Gradients = dict[str, Tensor]


def differences(worlds: dict[str, dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """For each world and each of two steps: relative distance of every parameter's fused gradient."""
    port = int(os.environ["MASTER_PORT"])
    found = {}
    for offset, (name, world) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + 2 * offset)
        plain = _gradients(fused=False, **world)
        os.environ["MASTER_PORT"] = str(port + 2 * offset + 1)
        fused = _gradients(fused=True, **world)
        found[name] = [_distances(*pair) for pair in zip(fused, plain, strict=True)]
    return found


def _gradients(
    *, fused: bool, options: dict[str, Any], policy: str, device_counts: bool = False, repaired: bool = True
) -> list[Gradients]:
    """``main_grad`` by parameter after each of two steps with different weights."""
    with lowered(options, "emulated", policy, device_counts=device_counts, fused=fused) as (_, trainer):
        import layouts

        from nemotron3_megatron.model.wgrad import spacing
        from nemotron3_megatron.train.step import accumulate_gradients

        chunk, steps = trainer.chunks[0], []
        for module in chunk.modules():
            if hasattr(module, "list_weights_backwards"):  # all experts' weights are one tensor
                weights = [module.get_parameter(f"weight{i}") for i in range(module.num_gemms)]
                assert (spacing(weights) or 0) >= weights[0].numel()
        if not repaired:
            for module in chunk.mtp.modules():
                if hasattr(module, "disable_parameter_transpose_cache"):
                    module.disable_parameter_transpose_cache = False
        for step in range(STEPS):
            accumulate_gradients(trainer, layouts.batches(trainer, step)[:MICRO_BATCHES], trainer.run.stages[0])
            assert _added(chunk) == (_of_linears(chunk) if fused else set())
            steps.append({name: parameter.main_grad.clone() for name, parameter in chunk.named_parameters()})
            with torch.no_grad():
                for parameter in chunk.parameters():
                    parameter.mul_(1.25)
        return steps


def _added(chunk: Any) -> set[str]:
    """Parameters whose gradients did not come from autograd."""
    return {name for name, parameter in chunk.named_parameters() if parameter.grad_added_to_main_grad}


def _of_linears(chunk: Any) -> set[str]:
    from nemotron3_megatron.precision.lowering.names import named_linears

    linears = [*named_linears(chunk).values(), chunk.output_layer]
    weights = {p for linear in linears for name, p in linear.named_parameters() if name.startswith("weight")}
    return {name for name, parameter in chunk.named_parameters() if parameter in weights}


def _distances(found: Gradients, expected: Gradients) -> dict[str, float]:
    assert found.keys() == expected.keys()
    return {name: _distance(found[name], reference) for name, reference in expected.items()}


def _distance(found: Tensor, reference: Tensor) -> float:
    """Relative; 0 where both are zero."""
    distance = float((found - reference).norm())
    return distance / float(reference.norm()) if distance else 0.0


def blobs_of_checkpoint(device_counts: bool) -> list[str]:
    """What a checkpoint of the te spec would hold besides tensors."""
    with lowered({}, "emulated", "{default: bf16}", device_counts=device_counts) as (_, trainer):
        from megatron.core.dist_checkpointing.dict_utils import nested_values
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        from nemotron3_megatron.checkpoint import content
        from nemotron3_megatron.model.builder import model_sharded_state

        def blobs(state: Any) -> list[str]:
            return [entry.key for entry in nested_values(state) if isinstance(entry, ShardedObject)]

        assert blobs(model_sharded_state(trainer.chunks[0], trainer.groups)), "the modules have none to leave out"
        return blobs(content.sharded(trainer.chunks, None))
