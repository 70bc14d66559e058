"""What is recorded of a run: one ``StepRecord`` an optimizer step, one ``EvalRecord`` a validation pass.

Sampled steps hold one ``OperandRecord`` for each operand of each quantised module.

A record is one JSON object on one line. Floats are written with ``repr``'s shortest form that reads back
to the same bits, so two runs can be compared bitwise; a number that is not finite is written as ``null``
(JSON has no NaN) and reads back as NaN.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Self

Health = dict[str, dict[str, float]]
"""Series name (``telemetry.health.SERIES``) to the value of each layer or role."""


class TagLoss(NamedTuple):
    """Main loss of the sequences whose source has one tag."""

    loss: float
    """Mean in nats per token; NaN if a loss was not finite."""
    tokens: int
    """That carried it: at least one."""


Tags = dict[str, TagLoss]
"""By tag; without those that were not read. Weighted with their tokens they mean the whole loss."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandRecord:
    """What quantising one operand lost, over the ranks and sampled micro-batches of a step.

    Exact definitions are in ``precision/statistics.py``.
    """

    module: str
    """Name with the global layer number, as in the precision plan."""
    layer: int | None
    """Global number in the decoder, from 0; None in MTP."""
    role: str
    tensor: str
    """``input``, ``weight`` or ``gradient`` (of the output)."""
    direction: str
    """``rows``: blocks lie along the last dimension; ``columns``: along tokens, or a weight's outputs."""
    format: str
    flush_to_zero: float
    """Share of the non-zero elements whose quantised value is 0."""
    saturation: float
    """Share of the non-zero elements that were clamped."""
    relative_error: float
    """||quantised - exact|| / ||exact||."""
    amax: float
    scale_min: float
    """Of the block scales: E4M3 numbers in NVFP4, exponents of two in MXFP8."""
    scale_max: float
    scale_zero: float
    """Share of block scales that are 0."""
    scale_subnormal: float

    @property
    def label(self) -> str:
        """``gradient``, or ``gradient_columns`` for blocks along columns."""
        return self.tensor if self.direction == "rows" else f"{self.tensor}_{self.direction}"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepRecord:
    """One optimizer step, whether its update was applied or refused.

    Losses are means over the tokens of the global batch, in nats.
    """

    step: int
    """Optimizer steps done, this one included (the first step is 1)."""
    tokens: int
    """Tokens seen since the start of the run, this step included."""
    stage: str
    loss: float
    mtp_losses: tuple[float, ...] = ()
    """One per multi-token-prediction depth; empty without MTP."""
    grad_norm: float
    """Global L2 norm before clipping."""
    lr: float
    tokens_per_s: float
    """Tokens of this step over its wall-clock time, all ranks together."""
    step_time_s: float
    skipped: bool = False
    """The update was refused (non-finite gradients, spike policy); weights did not move."""
    skip_reason: str = ""
    peak_memory_gib: float | None = None
    model_tflops: float | None = None
    """10^12 operations of the model's own arithmetic (``plan.counts``) a second, per rank; None on a CPU."""
    mfu: float | None = None
    """``model_tflops`` over the GPU's BF16 peak without sparsity, whatever formats are in force; None if unknown."""
    precision_backend: str = "none"
    """``native`` or ``emulated`` where the precision plan quantises something."""
    precision: tuple[OperandRecord, ...] = ()
    """Of quantised operands; empty in steps that were not sampled."""
    health: Health = field(default_factory=dict)
    """Diagnostics by layer or role (``telemetry.health``); empty in steps that were not sampled."""
    tags: Tags = field(default_factory=dict)
    """Main loss by tag of the sources; empty where the data has none."""
    time_s: float | None = None
    """When it was recorded, in seconds since 1970."""

    def to_json(self) -> str:
        """One strict JSON object without a line break; empty ``precision``, ``health`` and ``tags`` are left out."""
        fields = asdict(self)
        operands = [_with_null(operand) for operand in fields.pop("precision")]
        series = _series_of(fields)
        return _dump(fields | _unless_empty("precision", operands) | series)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`; keys of newer versions are ignored.

        Raises:
            ValueError: the text is not a JSON object or lacks a required key.
        """
        fields = _load(text, cls.__slots__, ("loss", "grad_norm", "lr", "tokens_per_s", "step_time_s"))
        fields["precision"] = tuple(_operand(found) for found in fields.get("precision", ()))
        return _construct(cls, fields)


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One pass over the validation batches, after ``step`` optimizer steps; losses in nats per token."""

    step: int
    tokens: int
    stage: str
    validation_loss: float
    mtp_losses: tuple[float, ...] = ()
    health: Health = field(default_factory=dict)
    """Expert load by layer (``telemetry.health``); empty without experts."""
    tags: Tags = field(default_factory=dict)
    """Main loss by tag of the sources; empty where the data has none."""

    def to_json(self) -> str:
        """One strict JSON object without a line break; empty ``health`` and ``tags`` are left out."""
        fields = asdict(self)
        series = _series_of(fields)
        return _dump(fields | series)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of :meth:`to_json`; keys of newer versions are ignored.

        Raises:
            ValueError: the text is not a JSON object or lacks a required key.
        """
        fields = _load(text, cls.__slots__, ("validation_loss",))
        return _construct(cls, fields)


def _series_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Take ``health`` and ``tags`` out of the fields; both as JSON holds them, if they are not empty."""
    health = {name: _with_null(values) for name, values in fields.pop("health").items()}
    tags = {name: _with_null(found._asdict()) for name, found in fields.pop("tags").items()}
    return _unless_empty("health", health) | _unless_empty("tags", tags)


def _unless_empty(name: str, value: dict[str, Any] | list[Any]) -> dict[str, Any]:
    return {name: value} if value else {}


def _health_from_json(found: dict[str, dict[str, float | None]]) -> Health:
    return {
        name: {row: math.nan if value is None else value for row, value in values.items()}
        for name, values in found.items()
    }


def _tag_loss(found: dict[str, Any]) -> TagLoss:
    fields = {key: value for key, value in found.items() if key in TagLoss._fields}
    return _construct(TagLoss, fields | ({"loss": math.nan} if fields.get("loss") is None else {}))


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, tuple):
        return [_finite(item) for item in value]
    return value


def _with_null(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: _finite(value) for key, value in fields.items()}


def _dump(fields: dict[str, Any]) -> str:
    return json.dumps(_with_null(fields), allow_nan=False)


def _operand(found: dict[str, Any]) -> OperandRecord:
    fields = {key: value for key, value in found.items() if key in OperandRecord.__slots__}
    nulls = [key for key, value in fields.items() if value is None and key != "layer"]
    return _construct(OperandRecord, fields | dict.fromkeys(nulls, math.nan))


def _load(text: str, names: tuple[str, ...], floats: tuple[str, ...]) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError(f"a record is a JSON object, not {text[:60]!r}")
    fields = {key: value for key, value in found.items() if key in names}
    for key in floats:
        if key in fields and fields[key] is None:
            fields[key] = math.nan
    fields["mtp_losses"] = tuple(math.nan if x is None else x for x in fields.get("mtp_losses", ()))
    fields["health"] = _health_from_json(fields.get("health", {}))
    fields["tags"] = {name: _tag_loss(values) for name, values in fields.get("tags", {}).items()}
    return fields


def _construct[T](cls: type[T], fields: dict[str, Any]) -> T:
    try:
        return cls(**fields)
    except TypeError as error:
        raise ValueError(f"incomplete {cls.__name__}: {error}") from error
