"""Telemetry: what a run records, where it is written, and how it is shown."""

from __future__ import annotations

from nemotron3_megatron.telemetry.records import EvalRecord, OperandRecord, StepRecord

__all__ = ["EvalRecord", "OperandRecord", "StepRecord"]
