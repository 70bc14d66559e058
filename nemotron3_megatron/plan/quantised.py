"""Bytes that a precision backend keeps of quantised operands."""

from __future__ import annotations

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.hardware import gpu_of
from nemotron3_megatron.plan.parameters import BYTES
from nemotron3_megatron.precision.policy import Format, Role

_NATIVE: dict[Format, float] = {"nvfp4": 0.5 + 1 / 16, "mxfp8": 1 + 1 / 32}
"""One direction of an element: 4 bits and a byte for every 16, 8 bits and a byte for every 32."""


def weight_bytes_kept(run: Run) -> dict[Role, float]:
    """What stays of a quantised weight between micro-batches, for one element.

    Emulated, values in BF16: once where one block serves both directions, else twice. Native: both directions. A role
    whose layers differ in format has their mean.
    """
    kept: dict[Role, list[float]] = {}
    plan, native = run.precision_plan, is_native(run)
    for row in plan.rows:
        if row.format == "bf16":
            held = 0.0
        elif native:
            held = 2 * _NATIVE[row.format]
        else:
            held = 2.0 if row.gemms.fprop[1].is_square else 4.0
        kept.setdefault(row.role, []).append(held)
    return {role: sum(each) / len(each) for role, each in kept.items()}


def input_bytes_saved(run: Run) -> dict[Role, float]:
    """What a quantised linear saves of its input for wgrad, for one element: a copy of its own.

    Roles that are quantised nowhere are absent: they save the tensor itself.
    """
    saved: dict[Role, list[float]] = {}
    plan, native = run.precision_plan, is_native(run)
    value = BYTES[run.precision.dtype]
    quantised = {row.role for row in plan.rows if row.format != "bf16"}
    for row in plan.rows:
        if row.role in quantised:
            held = _NATIVE[row.format] if native and row.format != "bf16" else value
            saved.setdefault(row.role, []).append(held)
    return {role: sum(each) / len(each) for role, each in saved.items()}


def is_native(run: Run) -> bool:
    """Whether the planned GPU computes in the formats itself."""
    if run.precision.backend != "auto":
        return run.precision.backend == "native"
    return run.precision.dtype == "bf16" and run.model.spec != "torch" and gpu_of(run).has_block_scales
