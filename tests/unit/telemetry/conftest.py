"""A real run, and the records of a training that was made up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.telemetry import EvalRecord, OperandRecord, StepRecord

TOKENS_PER_STEP = 4096


@pytest.fixture(scope="session")
def tiny() -> Run:
    stage = ("tokens='2M tokens'", "seq_length=256", "global_batch_size=16")
    telemetry = ("wandb=offline", "log_every='10 steps'")
    overrides = [*(f"stages.main.{value}" for value in stage), *(f"telemetry.{value}" for value in telemetry)]
    recipe, origins = compose(["recipe=tiny", "parallel=ep2", *overrides])
    return resolve(recipe, 2, origins)


@pytest.fixture
def run(tiny: Run, tmp_path: Path) -> Run:
    return dataclasses.replace(tiny, run_dir=tmp_path / "run")


@pytest.fixture
def step() -> Callable[..., StepRecord]:
    def make(number: int, **changes: object) -> StepRecord:
        loss = 3.0 + 5.0 * math.exp(-number / 40)
        record = StepRecord(
            step=number,
            tokens=number * TOKENS_PER_STEP,
            stage="main",
            loss=loss,
            mtp_losses=(loss + 0.3, loss + 0.6),
            grad_norm=1.25,
            lr=1e-3,
            tokens_per_s=2048.0,
            step_time_s=2.0,
            peak_memory_gib=0.5,
        )
        return dataclasses.replace(record, **changes)  # type: ignore[arg-type]

    return make


@pytest.fixture
def operands() -> tuple[OperandRecord, ...]:
    """Two layers of a role with 10 % and 30 % of their gradient flushed, nothing elsewhere, and an MTP module."""

    def make(layer: int | None, role: str, tensor: str, direction: str, flushed: float) -> OperandRecord:
        leaf = "mixer.in_proj" if role == "mamba.in_proj" else "eh_proj"
        return OperandRecord(
            module=f"mtp.layers.0.{leaf}" if layer is None else f"decoder.layers.{layer}.{leaf}",
            layer=layer,
            role=role,
            tensor=tensor,
            direction=direction,
            format="nvfp4",
            flush_to_zero=flushed,
            saturation=0.02,
            relative_error=0.1 + flushed,
            amax=3.5,
            scale_min=0.25,
            scale_max=448.0,
            scale_zero=0.0,
            scale_subnormal=0.01,
        )

    return (
        make(0, "mamba.in_proj", "input", "rows", 0.0),
        make(0, "mamba.in_proj", "gradient", "rows", 0.1),
        make(0, "mamba.in_proj", "gradient", "columns", 0.05),
        make(2, "mamba.in_proj", "gradient", "rows", 0.3),
        make(None, "mtp.eh_proj", "weight", "rows", 0.0),
    )


@pytest.fixture
def evaluation() -> Callable[[int], EvalRecord]:
    def make(number: int) -> EvalRecord:
        loss = 3.2 + 5.0 * math.exp(-number / 40)
        return EvalRecord(
            step=number,
            tokens=number * TOKENS_PER_STEP,
            stage="main",
            validation_loss=loss,
            mtp_losses=(loss + 0.3, loss + 0.6),
        )

    return make
