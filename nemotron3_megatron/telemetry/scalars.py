"""Names of the curves in TensorBoard and Weights & Biases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from nemotron3_megatron.telemetry.health import health_scalars
from nemotron3_megatron.telemetry.records import EvalRecord, OperandRecord, StepRecord, Tags


def step_scalars(record: StepRecord) -> dict[str, float]:
    """Curve name to value for one step; MTP depths count from 1."""
    scalars: dict[str, float] = {
        "train/loss": record.loss,
        "train/grad_norm": record.grad_norm,
        "train/lr": record.lr,
        "train/tokens": record.tokens,
        "train/skipped": float(record.skipped),
        "speed/tokens_per_s": record.tokens_per_s,
        "speed/step_time_s": record.step_time_s,
        **_by_depth("train", record.mtp_losses),
        **_by_tag("train", record.tags),
        **precision_scalars(record.precision),
        **health_scalars("health", record.health),
        **{f"health/mtp_{depth}_gap": loss - record.loss for depth, loss in enumerate(record.mtp_losses, start=1)},
    }
    if record.peak_memory_gib is not None:
        scalars["memory/peak_gib"] = record.peak_memory_gib
    return scalars


def precision_scalars(operands: Sequence[OperandRecord]) -> dict[str, float]:
    """Means over the layers of a role: ``precision/flush_to_zero/mamba.out_proj/gradient`` and alike.

    Blocks along columns have a curve of their own, ``…/gradient_columns``.
    """
    groups: dict[str, list[OperandRecord]] = {}
    for operand in operands:
        groups.setdefault(f"{operand.role}/{operand.label}", []).append(operand)
    return {
        f"precision/{name}/{group}": mean(getattr(record, name) for record in records)
        for name in ("flush_to_zero", "saturation", "relative_error")
        for group, records in groups.items()
    }


def most_flushed(operands: Sequence[OperandRecord]) -> OperandRecord:
    """The one, of at least one, that loses the largest share of its elements to zero; NaN counts as none."""
    return max(operands, key=lambda operand: -1.0 if math.isnan(operand.flush_to_zero) else operand.flush_to_zero)


def eval_scalars(record: EvalRecord) -> dict[str, float]:
    """Curve name to value for one validation pass."""
    return {
        "validation/loss": record.validation_loss,
        **_by_depth("validation", record.mtp_losses),
        **_by_tag("validation", record.tags),
        **health_scalars("validation/health", record.health),
    }


def _by_depth(group: str, losses: tuple[float, ...]) -> dict[str, float]:
    return {f"{group}/mtp_{depth}_loss": loss for depth, loss in enumerate(losses, start=1)}


def _by_tag(group: str, tags: Tags) -> dict[str, float]:
    return {f"{group}/loss_of/{tag}": found.loss for tag, found in tags.items()}
