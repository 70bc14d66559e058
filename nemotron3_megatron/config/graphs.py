"""Whether forward and backward of a step become one CUDA graph: decided alike by a run and by its plan."""

from __future__ import annotations

from typing import Literal

from nemotron3_megatron.config.experts import gathers_tokens, why_counts_on_cpu
from nemotron3_megatron.config.run import Run


def why_no_graph(run: Run, *, spec: Literal["torch", "te"], backend: Literal["none", "native", "emulated"]) -> str:
    """Why the passes of a run on GPUs are not captured, as ``parallel.cuda_graph`` wants it; empty: they are.

    Args:
        run: what is trained.
        spec: its modules.
        backend: of its quantised products.
    """
    wanted = run.parallel.cuda_graph
    if wanted == "none":
        return "parallel.cuda_graph=none"
    obstacle = next((why for why, holds in _obstacles(run, spec, backend).items() if holds), "")
    if wanted == "auto" and run.layout.world_size > 1:
        obstacle = obstacle or "on several GPUs a graph has to be asked for (parallel.cuda_graph=passes)"
    return obstacle


def _obstacles(run: Run, spec: str, backend: str) -> dict[str, bool]:
    layout = run.layout
    layers = run.model.pattern + run.model.mtp_pattern
    shapes = {(part.seq_length, part.micro_batch_size) for stage in run.own_stages for part in stage.shapes}
    observed = run.telemetry.precision_every is not None
    counted = why_counts_on_cpu(run, native=backend == "native")
    return {
        "the torch spec counts experts' tokens on the CPU": spec != "te",
        f"experts need their token counts on the CPU ({counted})": "E" in layers and bool(counted),
        # On an H200 replays of Transformer Engine's plain causal attention read memory that was given back.
        "attention is captured with isolated documents only (data.isolate_documents=true)": "*" in layers
        and not run.data.isolate_documents,
        "pipeline stages wait for each other": layout.pp > 1,
        "collectives inside the passes (tp, cp) are not captured": max(layout.tp, layout.cp) > 1,
        "what ranks exchange by alltoall is known on the CPU only after a wait "
        "(parallel.moe_token_dispatcher_type=allgather waits for nothing)": layout.ep > 1 and not gathers_tokens(run),
        "faults are injected from Python (debug.fault)": bool(run.debug.fault),
        "emulated rounding draws its random numbers from the CPU": backend == "emulated",
        "what quantisation loses is observed from Python (telemetry.precision_every)": backend != "none" and observed,
        "steps differ in their shapes": len(shapes) > 1,
    }
