"""What NVIDIA publishes about training speed, and how far the estimate is from it.

Source of every number: Megatron-Bridge ``docs/performance-summary.md`` (releases 26.02 to 26.08, mock data, balanced
routing) and its verification cards; layouts from its performance recipes (``perf_recipes/nemotronh``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from rich.table import Table

from nemotron3_megatron.accelerators import GPUS, Gpu
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.pipeline import hybrid_layer_pattern
from nemotron3_megatron.config.recipe import GpuName
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.tables import new_table
from nemotron3_megatron.plan.time import Estimate, estimate


@dataclass(frozen=True, slots=True)
class Published:
    """A published throughput and the layout it was measured on."""

    model: str
    gpu: GpuName
    precision: str
    """File in ``recipes/precision``."""
    gpus: int
    tp: int
    pp: int
    ep: int
    batch: int
    micro_batch: int
    tokens_per_s: float
    """A GPU."""
    seq_length: int = 8192
    note: str = ""


_FP8 = "per-tensor FP8, priced as MXFP8 on FP8 units"
_ASSUMED = "layout not published; that of Nano assumed"
_FSDP = "Megatron-FSDP, priced as a distributed optimizer"

PUBLISHED: tuple[Published, ...] = (
    Published("nano", "gb300", "mxfp8", 8, 1, 1, 8, 512, 4, 39_936),  # 26.08
    Published("nano", "gb200", "mxfp8", 8, 1, 1, 8, 512, 2, 34_816),  # 26.06.01
    Published("nano", "b300", "mxfp8", 8, 1, 1, 8, 512, 4, 37_316),  # 26.06
    Published("nano", "b200", "mxfp8", 8, 1, 1, 8, 512, 2, 32_768),  # 26.04.01
    Published("nano", "h100", "mxfp8", 16, 1, 1, 16, 1024, 1, 14_719, note=_FP8),  # 26.06
    Published("lightning", "gb200", "mxfp8", 8, 1, 1, 8, 512, 2, 28_672, note=_ASSUMED),  # 26.08
    Published("lightning", "gb200", "bf16", 8, 1, 1, 8, 512, 2, 28_750, note=_ASSUMED),  # card
    Published("lightning", "h100", "bf16", 16, 1, 1, 8, 512, 1, 14_195, note=_ASSUMED),  # card
    Published("super", "gb300", "mxfp8", 64, 1, 1, 64, 512, 1, 9_856),  # 26.08
    Published("super", "gb300", "nemotron3_nvfp4", 64, 1, 1, 64, 512, 1, 10_240),  # 26.08
    Published("super", "gb200", "mxfp8", 64, 2, 1, 64, 512, 1, 7_040),  # 26.08
    Published("super", "gb200", "nemotron3_nvfp4", 64, 2, 1, 64, 512, 1, 7_168),  # 26.08
    Published("super", "b300", "mxfp8", 64, 1, 1, 8, 512, 1, 7_867),  # 26.06
    Published("super", "b300", "nemotron3_nvfp4", 64, 1, 1, 8, 512, 1, 8_131),  # 26.06
    Published("super", "b200", "mxfp8", 64, 1, 1, 64, 512, 1, 6_400),  # 26.04.01
    Published("super", "b200", "nemotron3_nvfp4", 64, 1, 1, 64, 512, 1, 5_632),  # 26.04.01
    Published("super", "h100", "bf16", 64, 1, 2, 32, 1280, 1, 2_969, seq_length=4096),  # card
    Published("ultra", "gb300", "mxfp8", 256, 1, 1, 64, 256, 1, 3_552, note=_FSDP),  # 26.08
    Published("ultra", "gb200", "mxfp8", 256, 2, 1, 64, 256, 1, 2_528, note=_FSDP),  # 26.08
)

_MODELS: dict[str, tuple[str, ...]] = {
    "nano": ("recipe=nano_bf16",),
    "lightning": ("recipe=nano_bf16", "model=lightning"),
    "super": ("recipe=super_bf16",),
    "ultra": ("recipe=ultra_nvfp4",),
}


def comparisons() -> Iterator[tuple[Published, Estimate, float]]:
    """Each published figure, the estimate of the same run, and its relative error in tokens a second."""
    for row in PUBLISHED:
        guess = estimate(run_of(row), gpu_for(row))
        yield row, guess, guess.tokens_per_second_per_gpu / row.tokens_per_s - 1


def published_table() -> Table:
    """Published and estimated throughput side by side."""
    columns = ("model", "GPU", "precision", "GPUs TP PP EP", "published", "estimated", "error", "note")
    table = new_table("Tokens a second and GPU", *columns)
    for row, guess, error in comparisons():
        layout = f"{row.gpus} {row.tp} {row.pp} {row.ep}"
        speeds = (f"{row.tokens_per_s:,.0f}", f"{guess.tokens_per_second_per_gpu:,.0f}", f"{error:+.0%}")
        table.add_row(row.model, row.gpu.upper(), row.precision, layout, *speeds, row.note)
    return table


def gpu_for(row: Published) -> Gpu:
    """The GPU of a figure; H100's per-tensor FP8, which no policy here has, takes MXFP8's place."""
    gpu = next(gpu for gpu in GPUS if gpu.name == row.gpu)
    return replace(gpu, has_block_scales=True) if row.note == _FP8 else gpu


def run_of(row: Published) -> Run:
    """The recipe of the model in the figure's layout and batch."""
    base = _resolved(row.model, row.precision)
    dp = row.gpus // (row.tp * row.pp)
    stage = replace(
        base.stages[0],
        seq_length=row.seq_length,
        global_batch_size=row.batch,
        micro_batch_size=row.micro_batch,
        num_microbatches=row.batch // row.micro_batch // dp,
        tokens_per_step=row.batch * row.seq_length,
    )
    layout = replace(
        base.layout,
        world_size=row.gpus,
        tp=row.tp,
        pp=row.pp,
        ep=row.ep,
        dp=dp,
        sequence_parallel=row.tp > 1,
        hybrid_layer_pattern=hybrid_layer_pattern(base.model, row.pp, row.seq_length),
    )
    parallel = replace(base.parallel, moe_token_dispatcher_type="flex")  # DeepEP or HybridEP in all those recipes
    return replace(base, parallel=parallel, layout=layout, stages=(stage,))


@cache
def _resolved(model: str, precision: str) -> Run:
    recipe, origins = compose([*_MODELS[model], f"precision={precision}"])
    return resolve(recipe, recipe.world_size or 1, origins)
