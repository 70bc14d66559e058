"""What ranks do in the tests of health diagnostics."""

from __future__ import annotations

import os
from typing import Any

import torch
from layouts import batches, started
from megatron.core.transformer.moe.router import TopKRouter

from nemotron3_megatron.train.diagnostics import Diagnostics, require_float32_gradients
from nemotron3_megatron.train.step import Trainer, evaluate, train_step


def measure(worlds: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Health of the second step and of a validation pass under each layout, with the step's gradient norm."""
    port = int(os.environ["MASTER_PORT"])
    results: dict[str, Any] = {}
    for offset, (name, options) in enumerate(worlds.items()):
        os.environ["MASTER_PORT"] = str(port + offset)
        with started(options) as trainer:
            diagnostics, stage = Diagnostics(trainer), trainer.run.stages[0]
            reference = _reference(trainer) if name == "one" else {}
            train_step(trainer, batches(trainer, 0), stage, 1e-3)
            diagnostics.arm()
            result = train_step(trainer, batches(trainer, 1), stage, 1e-3)
            health = diagnostics.collect(result)
            diagnostics.arm()
            evaluate(trainer, iter(batches(trainer, 1)), stage)
            validation = diagnostics.loads()
            ours = {Diagnostics._layer_done, Diagnostics._routed}
            hooks = [h for c in trainer.chunks for m in c.modules() for h in m._forward_hooks.values()]
            results[name] = {
                "health": health,
                "validation": validation,
                "grad_norm": result.update.grad_norm,
                "hooks_left": sum(getattr(getattr(h, "func", None), "__func__", None) in ours for h in hooks),
                "reference": reference,
            }
    return results


def _reference(trainer: Trainer) -> dict[str, Any]:
    """Of the latest step: loads as Megatron-Core counts them, and the mean square of the final norm's input."""
    (chunk,) = trainer.chunks
    routers = [module for module in chunk.modules() if isinstance(module, TopKRouter)]
    found: dict[str, Any] = {"loads": [], "squares": []}
    finalize = trainer.chunks[0].config.finalize_model_grads_func

    def before(*args: Any, **kwargs: Any) -> None:
        found["loads"] = [router.local_tokens_per_expert.tolist() for router in routers]
        finalize(*args, **kwargs)

    def into_norm(_module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if args[0].requires_grad:
            found["squares"] = [*found["squares"], args[0].detach().double().square().mean().item()][-4:]

    trainer.chunks[0].config.finalize_model_grads_func = before
    chunk.decoder.final_norm.register_forward_pre_hook(into_norm)
    return found


def wrong_precision() -> str:
    """The message about a gradient buffer that is not FP32."""
    with started({}) as trainer:
        require_float32_gradients(trainer.chunks[0])
        weight = trainer.chunks[0].output_layer.weight
        weight.main_grad = weight.main_grad.bfloat16()
        try:
            require_float32_gradients(trainer.chunks[0])
        except RuntimeError as error:
            return str(error)
    return ""
