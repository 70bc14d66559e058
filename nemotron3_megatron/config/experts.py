"""How a run's experts receive their tokens: decisions that the model and the plan share."""

from __future__ import annotations

from nemotron3_megatron.config.run import Run


def gathers_tokens(run: Run) -> bool:
    """Whether every rank of an expert group receives all its tokens (``model/gathered.py``)."""
    return run.parallel.moe_token_dispatcher_type == "allgather" and run.layout.ep > 1


def keeps_counts_on_device(run: Run, *, native: bool) -> bool:
    """Whether the te spec's experts read their token counts on the GPU (``model/device_counts.py``).

    Args:
        run: what is trained.
        native: quantised products run on the GPU's own number formats: their kernels take counts from the CPU.
    """
    rows = run.precision_plan.rows
    quantised = any(row.format != "bf16" for row in rows if row.role.startswith("moe.experts"))
    whole = run.layout.etp == 1
    plain = run.parallel.moe_token_dispatcher_type != "flex" and "moe_act" not in run.parallel.recompute_modules
    return whole and plain and run.precision.dtype == "bf16" and not (quantised and native)
