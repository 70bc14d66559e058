"""A real run, and the records of a training that was made up."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.telemetry import EvalRecord, StepRecord

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
