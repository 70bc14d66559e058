"""Names of the curves in TensorBoard and Weights & Biases."""

from __future__ import annotations

from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord


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
    }
    if record.peak_memory_gib is not None:
        scalars["memory/peak_gib"] = record.peak_memory_gib
    return scalars


def eval_scalars(record: EvalRecord) -> dict[str, float]:
    """Curve name to value for one validation pass."""
    return {"validation/loss": record.validation_loss, **_by_depth("validation", record.mtp_losses)}


def _by_depth(group: str, losses: tuple[float, ...]) -> dict[str, float]:
    return {f"{group}/mtp_{depth}_loss": loss for depth, loss in enumerate(losses, start=1)}
