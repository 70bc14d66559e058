"""Which GPU a plan is for."""

from __future__ import annotations

from nemotron3_megatron.accelerators import GPUS, Gpu
from nemotron3_megatron.config.run import Run


def gpu_of(run: Run) -> Gpu:
    """The GPU a plan is for: the recipe's, else H100 for a model all in BF16 and GB200 for one with quantised GEMMs."""
    quantised = any(row.format != "bf16" for row in run.precision_plan.rows)
    name = run.gpu or ("gb200" if quantised else "h100")
    return next(gpu for gpu in GPUS if gpu.name == name)
