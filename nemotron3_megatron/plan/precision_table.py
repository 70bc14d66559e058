"""The precision plan for people: modules of equal treatment folded together, shares of the formats, footnotes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

from nemotron3_megatron.config.recipe import PrecisionConfig
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.precision_shares import Share, format_shares
from nemotron3_megatron.plan.tables import new_table
from nemotron3_megatron.precision.modules import FIXED
from nemotron3_megatron.precision.plan import FoldedRow, PrecisionPlan
from nemotron3_megatron.precision.policy import Block, Format, Role

_STYLE: dict[Format, str] = {"nvfp4": "green", "mxfp8": "yellow", "bf16": "blue"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Roles that one rule gives one format in the same layers."""

    block: Block
    roles: tuple[Role, ...]
    format: Format
    rule: str
    layers: tuple[int, ...]
    """Empty in MTP."""
    modules: int


def groups(plan: PrecisionPlan) -> tuple[Group, ...]:
    """The plan in as few rows as it takes, in the order of their first module."""
    together: dict[tuple[Block, Format, str, tuple[int, ...]], list[FoldedRow]] = {}
    for row in plan.folded():
        together.setdefault((row.block, row.format, row.rule, row.layers), []).append(row)
    return tuple(
        Group(
            block=block,
            roles=tuple(row.role for row in rows),
            format=number_format,
            rule=rule,
            layers=layers,
            modules=sum(row.modules for row in rows),
        )
        for (block, number_format, rule, layers), rows in together.items()
    )


def layer_ranges(layers: Sequence[int], among: Sequence[int]) -> str:
    """``0-9, 12``: neighbours among the layers that have the role at all, both sorted, are one range."""
    position = {layer: index for index, layer in enumerate(among)}
    runs: list[list[int]] = []
    for layer in layers:
        if runs and position[layer] == position[runs[-1][-1]] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def short_roles(roles: Iterable[str]) -> str:
    """``mamba.in_proj, out_proj; moe.experts.fc1, fc2``: what roles begin with is said once."""
    leaves: dict[str, list[str]] = {}
    for role in roles:
        stem, _, leaf = role.rpartition(".")
        leaves.setdefault(stem, []).append(leaf)
    return "; ".join(f"{stem}.{', '.join(names)}" for stem, names in leaves.items())


def precision_table(plan: PrecisionPlan, precision: PrecisionConfig) -> Table:
    """One row a group."""
    table = new_table(
        f"Precision: {precision.name} (a-b: all layers from a to b that have the role)",
        *("modules of", "format", "layers", "modules", "decoder layers", "decided by"),
    )
    reasons = {rule.label: rule.why for rule in precision.rules}
    for group in groups(plan):
        among = sorted({row.layer for row in plan.rows if row.role in group.roles and row.layer is not None})
        why = f" ({reasons[group.rule]})" if reasons.get(group.rule) else ""
        table.add_row(
            "MTP, all its layers" if _is_all_of_mtp(group, plan) else short_roles(group.roles),
            f"[{_STYLE[group.format]}]{group.format}[/]",
            str(len(group.layers)) if group.layers else "",
            str(group.modules),
            layer_ranges(group.layers, among) if group.layers else "MTP",
            escape(group.rule + why),
        )
    return table


def _is_all_of_mtp(group: Group, plan: PrecisionPlan) -> bool:
    return group.block == "mtp" and group.modules == sum(row.block == "mtp" for row in plan.rows)


def shares_table(run: Run) -> Table:
    """Parameters and operations by format."""
    shares = format_shares(run.precision_plan, run.model, run.own_stages[0].seq_length)
    title = "Shares of the formats (forward pass of one token)"
    table = new_table(title, "", "modules", "parameters", "", "MFLOP", "", "")
    parameters, flops = (sum(getattr(share, name) for share in shares) for name in ("parameters", "flops"))
    for share in shares:
        table.add_row(*_share_cells(share, parameters, flops), "")
    return table


def _share_cells(share: Share, parameters: int, flops: int) -> Iterator[str]:
    yield share.part
    yield str(share.modules) if share.modules else ""
    yield f"{share.parameters:,}"
    yield f"{share.parameters / parameters:.1%}"
    yield f"{share.flops / 1e6:,.1f}"
    yield f"{share.flops / flops:.1%}"


def notes(run: Run) -> Iterator[str]:
    """What the tables do not say: fixed parts, switches of NVFP4, type of unquantised values, backend."""
    fixed = ", ".join(f"{name} {number_format}" for name, number_format in FIXED.items())
    yield f"Under every policy: {fixed}."
    precision, used = run.precision, {row.format for row in run.precision_plan.rows}
    if precision.dtype == "fp32":
        yield "dtype fp32: parameters and activations are FP32, and bf16 above stands for values left as they are."
    if "nvfp4" in used:
        nvfp4 = precision.nvfp4
        rows, columns = nvfp4.weight_block
        hadamard = f"Hadamard transform of {nvfp4.hadamard.size} on both inputs of wgrad" if nvfp4.hadamard else ""
        gradients = "stochastically" if nvfp4.stochastic_rounding else "to nearest"
        weights = f"weights in {rows}x{columns} blocks"
        yield f"nvfp4: {weights}, {hadamard or 'no Hadamard transform'}, gradients rounded {gradients}."
    if used != {"bf16"}:
        yield f"Backend {precision.backend}: {_backend(run)}."


def _backend(run: Run) -> str:
    if run.precision.backend == "native":
        return "Transformer Engine's kernels, on Blackwell (sm_100, sm_103) only"
    if run.precision.backend == "emulated":
        return f"quantised and dequantised around GEMMs in {run.precision.dtype}"
    obstacles = {
        "precision.dtype=fp32": run.precision.dtype == "fp32",
        "model.spec=torch": run.model.spec == "torch",
        "device=cpu": run.device == "cpu",
    }
    obstacle = next((value for value, here in obstacles.items() if here), None)
    return (
        f"emulated, because of {obstacle}" if obstacle else "native on Blackwell (sm_100, sm_103), emulated elsewhere"
    )
