"""How a step will be computed: what modules and loop decide by themselves, and why something is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rich.box import SIMPLE
from rich.table import Table

from nemotron3_megatron.config.experts import why_counts_on_cpu
from nemotron3_megatron.config.graphs import why_no_graph
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.activation_shape import Spec, planned_spec
from nemotron3_megatron.plan.quantised import is_native


@dataclass(frozen=True, slots=True)
class Feature:
    """One decision about a step."""

    name: str
    state: str
    why: str = ""


def features(run: Run) -> list[Feature]:
    """All decisions, as they are on the run's device; on GPUs where the recipe names none."""
    spec = planned_spec(run)
    return [*_kernels(run, spec), *_experts(run, spec), *_replicas(run), *_passes(run, spec)]


def features_table(run: Run) -> Table:
    """For the plan."""
    table = Table(title="How a step is computed", title_justify="left", title_style="bold", box=SIMPLE)
    for heading in ("what", "how", "why"):
        table.add_column(heading, overflow="fold", header_style="dim")
    for feature in features(run):
        table.add_row(feature.name, feature.state, feature.why)
    return table


def _kernels(run: Run, spec: Spec) -> Iterator[Feature]:
    on_cpu = run.device == "cpu"
    chosen = "device=cpu" if on_cpu else f"model.spec={run.model.spec}"
    packages = "Transformer Engine, mamba-ssm, causal-conv1d" if spec == "te" else "torch"
    yield Feature("modules", packages, f"{chosen}; torch where the packages are missing" if spec == "te" else chosen)
    fused = "in one with the output layer, in parts" if on_cpu else "in one with the output layer, logits made once"
    yield Feature("loss", fused)
    added = "added to FP32 buffers by their GEMMs" if spec == "te" else "added to FP32 buffers after their GEMMs"
    yield Feature("weight gradients", added, "" if spec == "te" else "the torch spec's products cannot add")


def _experts(run: Run, spec: Spec) -> Iterator[Feature]:
    if "E" not in run.model.pattern + run.model.mtp_pattern:
        return
    layout, dispatcher = run.layout, run.parallel.moe_token_dispatcher_type
    if spec == "torch":
        yield Feature("experts", "one after the other", "the torch spec")
    elif counted := why_counts_on_cpu(run, native=is_native(run)):
        yield Feature("experts", "Transformer Engine's grouped linear, token counts on the CPU", counted)
    else:
        yield Feature("experts", "one grouped product, token counts stay on the GPU")
    fused = run.model.moe_router_fusion
    chooses = "Transformer Engine's kernels" if fused else "torch's operations"
    yield Feature("choice of experts", chooses, f"model.moe_router_fusion={str(fused).lower()}")
    if layout.ep * layout.etp > 1:
        yield Feature("tokens to experts", dispatcher, f"parallel.moe_token_dispatcher_type={dispatcher}")
    else:
        yield Feature("tokens to experts", "none travels", "ep = etp = 1")


def _replicas(run: Run) -> Iterator[Feature]:
    parallel, replicas = run.parallel, run.layout.dp * run.layout.cp
    for name, flag, beside, alone in (
        ("gradients", "overlap_grad_reduce", "reduced beside the backward pass", "reduced after the backward pass"),
        ("parameters", "overlap_param_gather", "gathered beside the forward pass", "gathered after the update"),
    ):
        on = getattr(parallel, flag)
        if replicas == 1:
            yield Feature(name, "one replica")
        elif name == "parameters" and not parallel.distributed_optimizer:
            yield Feature(name, "every replica updates all", "parallel.distributed_optimizer=false")
        else:
            yield Feature(name, beside if on else alone, f"parallel.{flag}={str(on).lower()}")


def _passes(run: Run, spec: Spec) -> Iterator[Feature]:
    quantised = any(row.format != "bf16" for row in run.precision_plan.rows)
    backend: Literal["none", "native", "emulated"] = "native" if is_native(run) else "emulated"
    obstacle = why_no_graph(run, spec=spec, backend=backend if quantised else "none")
    obstacle = "there is no GPU" if run.device == "cpu" else obstacle
    yield Feature("CUDA graph", "none" if obstacle else "forward and backward pass, from the third step on", obstacle)
    modules = ", ".join(run.parallel.recompute_modules)
    recomputed = {"none": "nothing", "full": "every layer", "selective": modules}[run.parallel.recompute]
    yield Feature("recomputed", recomputed, f"parallel.recompute={run.parallel.recompute}")
    isolated = run.data.isolate_documents
    yield Feature(
        "packed documents",
        "do not see each other" if isolated else "see each other",
        f"data.isolate_documents={str(isolated).lower()}",
    )
