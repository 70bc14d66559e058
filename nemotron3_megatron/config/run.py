"""The run: a recipe resolved for one world, with every number derived and nothing left to decide."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.recipe import (
    CheckpointConfig,
    DataConfig,
    DebugConfig,
    GpuName,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    ResilienceConfig,
    TelemetryConfig,
)
from nemotron3_megatron.config.stage import Layout, Shape, Stage

if TYPE_CHECKING:
    from nemotron3_megatron.precision.plan import PrecisionPlan

__all__ = ["ConstantRate", "Layout", "Origin", "Run", "Schedule", "Shape", "Stage"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantRate:
    """A part of the run with a learning rate of its own."""

    first_token: int
    end_token: int
    lr: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Learning rate as a function of tokens seen (all lengths in tokens)."""

    max_lr: float
    min_lr: float
    warmup_tokens: int
    decay_end_tokens: int
    wsd_decay_tokens: int
    decay_style: str
    wsd_decay_style: str
    constant: tuple[ConstantRate, ...] = ()
    """Stages beside the schedule, in order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a value that differs from its default was set."""

    key: str
    value: str
    default: str
    place: str
    """``recipes/recipe/tiny.yaml:12`` or ``command line``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Everything a start needs; a pure function of the recipe, the world size and the stage in force.

    ``parallel``, ``layout``, ``precision`` and ``trainable`` are those of the stage in force, and of ``own_stages``.
    """

    name: str
    run_dir: Path
    seed: int
    device: Literal["auto", "cpu", "cuda"]
    total_steps: int
    """Steps of all stages, cut at max_steps."""
    model: ModelConfig
    precision: PrecisionConfig
    parallel: ParallelConfig
    layout: Layout
    optimizer: OptimizerConfig
    schedule: Schedule
    stages: tuple[Stage, ...]
    data: DataConfig
    checkpoint: CheckpointConfig
    telemetry: TelemetryConfig
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
    trainable: tuple[str, ...] = ()
    """Of the stage in force."""
    gpu: GpuName | None = None
    """As the recipe says; of effect in planning only."""
    origins: tuple[Origin, ...]

    @property
    def precision_plan(self) -> PrecisionPlan:
        """What every module of the whole model computes in: a pure function of ``precision`` and ``model``."""
        return _precision_plan(self.precision, self.model)

    @property
    def own_stages(self) -> tuple[Stage, ...]:
        """The stages that this start can train (``can_train``)."""
        return tuple(stage for stage in self.stages if self.can_train(stage))

    @property
    def longest(self) -> int:
        """The longest sequence of any stage."""
        return max(shape.seq_length for stage in self.stages for shape in stage.shapes)

    def can_train(self, stage: Stage) -> bool:
        """Whether a stage has the layout, precision and trainable parameters of this start."""
        if stage.parallel is None:
            return True
        own = (self.parallel, self.layout, self.precision, self.trainable)
        return own == (stage.parallel, stage.layout, stage.precision, stage.trainable)

    def for_stage(self, stage: Stage) -> Run:
        """This run under the layout and precision of one of its stages."""
        if stage.parallel is None or stage.layout is None or stage.precision is None:
            return self
        own = {name: getattr(stage, name) for name in ("parallel", "layout", "precision", "trainable")}
        return replace(self, **own)

    def stage_at(self, step: int) -> Stage:
        """The stage that optimizer step ``step`` (0-based) belongs to; the last one for later steps."""
        for stage in self.stages:
            if step < stage.end_step:
                return stage
        return self.stages[-1]

    def shape_at(self, step: int) -> Shape:
        """The batch of optimizer step ``step`` (0-based)."""
        return self.stage_at(step).shape_at(step)

    def tokens_at(self, step: int) -> int:
        """Tokens seen before optimizer step ``step`` (0-based)."""
        return self.stage_at(step).tokens_at(step)

    def is_due(self, every: Duration | None, step: int) -> bool:
        """Whether ``step`` steps or their tokens have just reached a multiple of ``every``; for None never.

        A step of many tokens may reach several multiples, and is due once.
        """
        if every is None:
            return False
        if every.unit == "steps":
            return step % math.ceil(every.value) == 0
        return self.tokens_at(step) // every.value > self.tokens_at(step - 1) // every.value


@lru_cache(maxsize=8)
def _precision_plan(policy: PrecisionConfig, model: ModelConfig) -> PrecisionPlan:
    """Cached: planning asks for it again and again."""
    from nemotron3_megatron.precision.plan import precision_plan  # imports this package

    return precision_plan(policy, model)
