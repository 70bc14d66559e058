"""Health of a step, measured on the built model: activations and expert load by hooks, gradients from DDP's buffers.

Each rank fills the rows of the layers it has in tables of the whole model; a sum over the world does the rest, so that
every layout gives the same numbers. Rows are decoder layers by global number from 0, then ``mtp 0``, ``mtp 1``, …: the
layers inside the MTP blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from megatron.core.transformer.moe.router import TopKRouter
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemotron3_megatron.precision.modules import LEAVES
from nemotron3_megatron.telemetry.health import max_violation
from nemotron3_megatron.telemetry.records import Health
from nemotron3_megatron.train.step import StepResult, Trainer

_LEAF_ROLES = {leaf: role for leaves in LEAVES.values() for role, leaf in leaves}
OTHER_ROLES = {
    "eh_proj": "mtp.eh_proj",
    "word_embeddings": "embedding",
    "output_layer": "output",
    "router": "router",
    "conv1d": "mamba.conv1d",
    "A_log": "mamba.scalars",
    "dt_bias": "mamba.scalars",
    "mixer.D": "mamba.scalars",
    "norm": "norms",
}
"""By a part of the parameter's name; tried after the names of linears, in this order."""


def role_of(parameter: str) -> str:
    """The role of a parameter by its name in the model; a norm inside a linear module is one of the norms."""
    if "norm" in parameter.rsplit(".", 1)[-1]:
        return "norms"
    for part, role in (_LEAF_ROLES | OTHER_ROLES).items():
        if part in parameter:
            return role
    return "other"


def require_float32_gradients(chunk: nn.Module) -> None:
    """Refuse to train where a gradient is not accumulated in FP32.

    BF16 accumulation in the output layer made Ultra diverge (Ultra report, stability section).

    Raises:
        RuntimeError: names the parameters.
    """
    wrong = [
        name
        for name, parameter in chunk.named_parameters()
        if parameter.requires_grad and getattr(parameter, "main_grad", parameter).dtype is not torch.float32
    ]
    if wrong:
        raise RuntimeError(f"gradients of {', '.join(wrong[:5])} ({len(wrong)} in all) are not accumulated in FP32")


class Diagnostics:
    """Measures one step at a time; every rank makes one, and all call it around the same steps."""

    def __init__(self, trainer: Trainer) -> None:
        model = trainer.run.model
        blocks = min(model.mtp_depths, 1) if model.mtp_use_repeated_layer else model.mtp_depths
        mtp_layers = blocks * len(model.mtp_pattern)
        self._trainer = trainer
        self.rows = [str(i) for i in range(len(model.pattern))] + [f"mtp {i}" for i in range(mtp_layers)]
        self._layers = [numbered for chunk in trainer.chunks for numbered in numbered_layers(chunk, len(model.pattern))]
        self._routers = [(row, m) for row, layer in self._layers for m in layer.modules() if isinstance(m, TopKRouter)]
        self.roles = sorted({*_LEAF_ROLES.values(), *OTHER_ROLES.values(), "other"})
        device = trainer.platform.device
        self._residual = torch.zeros(len(self.rows), 2, dtype=torch.float64, device=device)
        self._loads = torch.zeros(len(self.rows), model.num_moe_experts, dtype=torch.float64, device=device)
        self._hooks: list[RemovableHandle] = []

    def arm(self) -> None:
        """Look at the coming passes."""
        self.forget()
        self._hooks = [layer.register_forward_hook(partial(self._layer_done, row)) for row, layer in self._layers]
        self._hooks += [router.register_forward_hook(partial(self._routed, row)) for row, router in self._routers]

    def forget(self) -> None:
        """Drop what the passes since :meth:`arm` have shown."""
        self._residual.zero_()
        self._loads.zero_()

    def loads(self) -> Health:
        """Stop looking; expert load of the passes since :meth:`arm`, of all ranks. A collective."""
        self._disarm()
        torch.distributed.all_reduce(self._loads)
        return self._violations()

    def collect(self, result: StepResult) -> Health:
        """Stop looking; all series of the step that was just done. One collective over the world."""
        self._disarm()
        biases = torch.zeros(len(self.rows), 2, dtype=torch.float64, device=self._loads.device)
        for row, router in self._routers:
            bias = router.expert_bias
            biases[row] = torch.stack([bias.max() - bias.min(), torch.ones_like(bias[0])]) if bias is not None else 0.0
        gradients = self._gradients(result)
        tables = (self._loads, self._residual, biases, gradients)
        whole = torch.cat([table.flatten() for table in tables])
        torch.distributed.all_reduce(whole)
        for table, part in zip(tables, whole.split([table.numel() for table in tables]), strict=True):
            table.copy_(part.view_as(table))
        residual, drift, squares = self._residual.tolist(), biases.tolist(), gradients.tolist()
        by_layer, by_role = squares[: len(self.rows)], squares[len(self.rows) :]
        series = {
            "residual_rms": _named(self.rows, [(math.sqrt(s / n) if n else None) for s, n in residual]),
            "router_bias_range": _named(self.rows, [(s / n if n else None) for s, n in drift]),
            "layer_gradient_norm": _named(self.rows, [(math.sqrt(s) if n else None) for s, _, n in by_layer]),
            "role_gradient_norm": _named(self.roles, [(math.sqrt(s) if n else None) for s, _, n in by_role]),
            "role_gradient_zeros": _named(self.roles, [(z / n if n else None) for _, z, n in by_role]),
        }
        return self._violations() | {name: values for name, values in series.items() if values}

    def _violations(self) -> Health:
        found = [max_violation(loads) if sum(loads) > 0 else None for loads in self._loads.tolist()]
        named = _named(self.rows, found)
        return {"max_violation": named} if named else {}

    def _disarm(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    @torch.no_grad()
    def _layer_done(self, row: int, layer: nn.Module, args: Any, output: Tensor | tuple[Tensor, ...]) -> None:
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad:  # else it is validation, or the first of a recomputed layer's two passes
            squares = hidden.detach().float().square().sum(dtype=torch.float64)
            self._residual[row] += torch.stack([squares, torch.full_like(squares, hidden.numel())])

    @torch.no_grad()
    def _routed(self, row: int, router: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
        probabilities, chosen = output
        if probabilities.requires_grad or not router.training:
            self._loads[row] += chosen.sum(dim=0)

    @torch.no_grad()
    def _gradients(self, result: StepResult) -> Tensor:
        """(rows + roles, 3) float64: squares, zeros and elements of the unclipped gradients that this rank owns."""
        table = torch.zeros(len(self.rows) + len(self.roles), 3, dtype=torch.float64, device=self._loads.device)
        places = {id(p): row for row, layer in self._layers for p in layer.parameters()}
        clipped = clip_factor(result, self._trainer.run.optimizer.clip_grad)
        for model in self._trainer.model:
            names = {id(parameter): name for name, parameter in model.module.named_parameters()}
            for parameter, gradient in owned_gradients(model, self._trainer):
                squares = gradient.square().sum(dtype=torch.float64) / clipped**2
                zeros = gradient.numel() - gradient.count_nonzero()
                found = torch.stack([squares, zeros.double(), torch.full_like(squares, gradient.numel())])
                table[len(self.rows) + self.roles.index(role_of(names[id(parameter)]))] += found
                if id(parameter) in places:
                    table[places[id(parameter)]] += found
        return table


def numbered_layers(chunk: nn.Module, decoder_layers: int) -> Iterator[tuple[int, nn.Module]]:
    """The layers of a chunk with their row: the global number in the decoder, then those inside MTP blocks."""
    for layer in chunk.get_submodule("decoder.layers").children():
        yield int(layer.layer_number) - 1, layer  # type: ignore[arg-type]
    if hasattr(chunk, "mtp"):
        blocks = chunk.get_submodule("mtp.layers").children()
        inner = (layer for block in blocks for layer in block.get_submodule("mtp_model_layer.layers").children())
        yield from enumerate(inner, start=decoder_layers)


def clip_factor(result: StepResult, clip_grad: float) -> float:
    """What Megatron-Core's clipping multiplied the gradients by (core/optimizer/clip_grads.py)."""
    norm = result.update.grad_norm
    factor = clip_grad / (norm + 1e-6)
    return factor if result.update.applied and clip_grad > 0 and factor < 1.0 else 1.0


def owned_gradients(model: DistributedDataParallel, trainer: Trainer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """Reduced gradients, each element on exactly one rank of the world.

    With the distributed optimizer a rank has its share of every bucket, else all of it, of which one replica counts.
    """
    groups = trainer.groups
    share = trainer.run.parallel.distributed_optimizer
    for buffers, group in ((model.buffers, groups.dp_cp), (model.expert_parallel_buffers, groups.expt_dp)):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            size = bucket.grad_data.numel() // group.size() if share else bucket.grad_data.numel()
            low = group.rank() * size if share else 0
            for parameter in bucket.params_list:
                if not (param_is_not_shared(parameter) and _is_first_of_tensor_parallel(parameter, trainer)):
                    continue
                if not share and group.rank():
                    continue
                start, end = bucket.param_to_index[parameter]
                part = bucket.grad_data[max(start, low) : min(end, low + size)]
                if part.numel():
                    yield parameter, part


def _is_first_of_tensor_parallel(parameter: nn.Parameter, trainer: Trainer) -> bool:
    found: bool = param_is_not_tensor_parallel_duplicate(parameter, trainer.groups.tp, trainer.groups.expt_tp)
    return found


def _named(names: list[str], values: list[float | None]) -> dict[str, float]:
    """Without those that no rank has; 5 significant digits, since there are many."""
    return {n: float(f"{v:.5g}") for n, v in zip(names, values, strict=True) if v is not None}
