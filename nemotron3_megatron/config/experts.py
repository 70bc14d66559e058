"""How a run's experts receive their tokens: decisions that the model and the plan share."""

from __future__ import annotations

from nemotron3_megatron.config.run import Run


def gathers_tokens(run: Run) -> bool:
    """Whether every rank of an expert group receives all its tokens (``model/gathered.py``)."""
    return run.parallel.moe_token_dispatcher_type == "allgather" and run.layout.ep > 1


def most_rows_per_token(ranks: int, experts: int, topk: int) -> int:
    """Rows that a rank's experts get at most, of each token a rank of their group has.

    Args:
        ranks: of the group.
        experts: of a rank.
        topk: experts that a token chooses.
    """
    return ranks * min(topk, experts)


def keeps_counts_on_device(run: Run, *, native: bool) -> bool:
    """Whether the te spec's experts read their token counts on the GPU (``model/device_counts.py``).

    Args:
        run: what is trained.
        native: quantised products run on the GPU's own number formats: their kernels take counts from the CPU.
    """
    return not why_counts_on_cpu(run, native=native)


def why_counts_on_cpu(run: Run, *, native: bool) -> str:
    """What keeps the te spec's experts from reading their token counts on the GPU; empty: they do."""
    rows, parallel = run.precision_plan.rows, run.parallel
    quantised = any(row.format != "bf16" for row in rows if row.role.startswith("moe.experts"))
    reasons = {
        f"precision.dtype={run.precision.dtype}": run.precision.dtype != "bf16",
        f"parallel.etp={run.layout.etp}": run.layout.etp > 1,
        "parallel.moe_token_dispatcher_type=flex": parallel.moe_token_dispatcher_type == "flex",
        "moe_act is recomputed": "moe_act" in parallel.recompute_modules,
        "native NVFP4 and MXFP8 products take them there": quantised and native,
    }
    return next((reason for reason, holds in reasons.items() if holds), "")
