"""The run: a recipe resolved for one world, with every number derived and nothing left to decide."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nemotron3_megatron.config.recipe import (
    CheckpointConfig,
    DataConfig,
    GpuName,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    TelemetryConfig,
)

if TYPE_CHECKING:
    from nemotron3_megatron.precision.plan import PrecisionPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Sizes of the parallel dimensions; world_size = tp * pp * cp * dp."""

    world_size: int
    tp: int
    pp: int
    vpp: int
    cp: int
    ep: int
    etp: int
    dp: int
    sequence_parallel: bool
    hybrid_layer_pattern: str
    """Megatron's pattern: the main stack with '|' pipeline cuts, then '/'-separated MTP depths."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """A stage with its place on the run's step and token axes."""

    name: str
    first_step: int
    steps: int
    first_token: int
    tokens_per_step: int
    seq_length: int
    global_batch_size: int
    micro_batch_size: int
    num_microbatches: int

    @property
    def end_step(self) -> int:
        """The first step after this stage."""
        return self.first_step + self.steps


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
    """Everything a start needs; a pure function of the recipe and the world size."""

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
    checkpoint_every_steps: int | None
    telemetry: TelemetryConfig
    log_every_steps: int
    eval_every_steps: int | None
    precision_every_steps: int | None
    gpu: GpuName | None = None
    """As the recipe says; of effect in planning only."""
    origins: tuple[Origin, ...]

    @property
    def precision_plan(self) -> PrecisionPlan:
        """What every module of the whole model computes in: a pure function of ``precision`` and ``model``."""
        return _precision_plan(self.precision, self.model)

    def stage_at(self, step: int) -> Stage:
        """The stage that optimizer step ``step`` (0-based) belongs to; the last one for later steps."""
        for stage in self.stages:
            if step < stage.end_step:
                return stage
        return self.stages[-1]

    def tokens_at(self, step: int) -> int:
        """Tokens seen before optimizer step ``step`` (0-based)."""
        stage = self.stage_at(step)
        return stage.first_token + (step - stage.first_step) * stage.tokens_per_step


@lru_cache(maxsize=8)
def _precision_plan(policy: PrecisionConfig, model: ModelConfig) -> PrecisionPlan:
    """Cached: planning asks for it again and again."""
    from nemotron3_megatron.precision.plan import precision_plan  # imports this package

    return precision_plan(policy, model)
