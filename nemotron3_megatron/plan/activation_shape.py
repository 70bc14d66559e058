"""What the terms of the activations' memory are made of.

Letters: T tokens of a micro-batch on a context-parallel rank, t those between blocks (T / tp under sequence
parallelism), H hidden, tp the tensor-parallel ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from nemotron3_megatron.config.experts import keeps_counts_on_device, most_rows_per_token
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.plan.parameters import BYTES
from nemotron3_megatron.plan.quantised import input_bytes_saved
from nemotron3_megatron.precision.policy import Role

FLOAT = 4
LONG = 8
"""Bytes of an element, FP32 and int64."""

Spec = Literal["torch", "te"]


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes on a rank."""

    saved: int
    """From the forward pass to the backward pass."""
    transient: int
    """Most that is alive besides, inside the layer's backward pass."""
    lasting: int = 0
    """Of ``saved``, what modules hold until their next forward pass, even where the layer is recomputed."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the terms are made of."""

    run: Run
    stage: Stage
    """Gives the lengths of sequences and micro-batches."""
    tokens: int
    """T."""
    between: int
    """t."""
    imbalance: float
    """Tokens of the fullest expert-parallel rank over the mean."""
    copies: Mapping[Role, float]
    """Bytes an element that quantised linears save of their input (``quantised.input_bytes_saved``)."""
    groups_experts: bool
    """One product serves all unquantised experts: their weights, and the gradients, are in one tensor meanwhile."""

    @property
    def model(self) -> ModelConfig:
        """The architecture."""
        return self.run.model

    @property
    def spec(self) -> Spec:
        """The module spec that the run will use."""
        return planned_spec(self.run)

    @property
    def on_cpu(self) -> bool:
        """Whether the run is for CPUs for certain: a plan without a device is one for GPUs."""
        return self.run.device == "cpu"

    @property
    def value(self) -> int:
        """Bytes of an activation."""
        return BYTES[self.run.precision.dtype]

    def saved_input(self, role: Role) -> float:
        """Bytes an element of a linear's input, where nothing else saves it."""
        return self.copies.get(role, self.value)

    def recomputes(self, module: str) -> bool:
        """Whether selective recomputation leaves out what ``module`` saves."""
        parallel = self.run.parallel
        return parallel.recompute == "selective" and module in parallel.recompute_modules


def planned_spec(run: Run) -> Spec:
    """The module spec that a run will use: on CPUs, and where the recipe says so, torch; else GPUs' default."""
    return "torch" if run.device == "cpu" or run.model.spec == "torch" else "te"


def largest_imbalance(run: Run) -> float:
    """Every token of the expert-parallel ranks chooses as many experts of one rank as there are."""
    model, ep = run.model, run.layout.ep
    return most_rows_per_token(ep, model.num_moe_experts // ep, model.moe_router_topk) / model.moe_router_topk


def shape(run: Run, stage: Stage, imbalance: float = 1.0) -> Shape:
    """The shape of a stage's micro-batches."""
    layout = run.layout
    tokens = stage.micro_batch_size * stage.seq_length // layout.cp
    between = tokens // layout.tp if layout.sequence_parallel else tokens
    return Shape(
        run, stage, tokens, between, imbalance, input_bytes_saved(run), keeps_counts_on_device(run, native=True)
    )
