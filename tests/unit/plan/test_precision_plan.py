"""What the plan says of precision: folded rows, shares, notes, and the picture's pixels."""

from __future__ import annotations

from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from rich.console import Console

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.plan.counts import count_parameters, flops_per_token
from nemotron3_megatron.plan.precision_map import _COLOURS, draw_precision_map
from nemotron3_megatron.plan.precision_shares import format_shares
from nemotron3_megatron.plan.precision_table import groups, layer_ranges, notes, precision_table, short_roles


def resolved(*overrides: str) -> Run:
    recipe, origins = compose(overrides)
    return resolve(recipe, recipe.world_size or 1, origins)


@pytest.fixture(scope="module")
def super_run() -> Run:
    return resolved("recipe=super_nvfp4")


def test_groups_of_super(super_run: Run) -> None:
    folded = groups(super_run.precision_plan)
    assert sum(group.modules for group in folded) == 345
    assert sum(group.modules for group in folded if group.block == "mtp") == 9
    found = {(group.roles, group.rule): group for group in folded if group.block == "decoder"}
    mamba = found[("mamba.in_proj",), "default"]
    assert (mamba.format, len(mamba.layers), mamba.modules) == ("nvfp4", 34, 34)
    experts = found[("moe.experts.fc1", "moe.experts.fc2", "moe.shared.fc1", "moe.shared.fc2"), "default"]
    assert (experts.format, len(experts.layers), experts.modules) == ("nvfp4", 33, 4 * 33)
    attention = found[("attention.qkv", "attention.proj"), "layers last 15%"]
    assert (attention.format, attention.layers) == ("bf16", (78,))


@given(among=st.sets(st.integers(0, 60), min_size=1), data=st.data())
def test_ranges_name_exactly_the_layers_that_have_the_role(among: set[int], data: st.DataObject) -> None:
    layers = data.draw(st.sets(st.sampled_from(sorted(among))))
    named: set[int] = set()
    for part in filter(None, layer_ranges(sorted(layers), sorted(among)).split(", ")):
        first, _, last = part.partition("-")
        named |= among & set(range(int(first), int(last or first) + 1))
    assert named == layers


def test_short_forms() -> None:
    assert layer_ranges([0, 2, 4, 5, 6, 7, 8, 9], range(10)) == "0, 2, 4-9"
    assert layer_ranges([0, 2, 6], [0, 2, 4, 6]) == "0-2, 6"
    assert short_roles(["mamba.in_proj", "moe.experts.fc1", "moe.experts.fc2"]) == "mamba.in_proj; moe.experts.fc1, fc2"


def test_shares_of_super_by_hand(super_run: Run) -> None:
    shares = {share.part: share for share in format_shares(super_run.precision_plan, super_run.model, 8192)}
    in_proj, out_proj = 18560 * 4096, 4096 * 8192
    expert, shared = 2 * 1024 * 2688, 2 * 4096 * 5376
    assert shares["nvfp4"].parameters == 34 * in_proj + 33 * (512 * expert + shared)
    assert shares["nvfp4"].flops == 2 * (34 * in_proj + 33 * (22 * expert + shared))
    assert (shares["mxfp8"].parameters, shares["mxfp8"].flops) == (34 * out_proj, 2 * 34 * out_proj)
    attention, latent = 4096 * (32 + 2 * 2 + 32) * 128, 2 * 1024 * 4096
    tail = 6 * (in_proj + out_proj) + 7 * (512 * expert + shared)
    mtp = 2 * 4096 * 4096 + attention + latent + 512 * expert + shared
    assert shares["bf16"].parameters == 8 * attention + 40 * latent + tail + mtp
    passed = 6 * (in_proj + out_proj) + 7 * (22 * expert + shared)
    # MTP's one block is passed twice.
    passed += 8 * attention + 40 * latent + 2 * (mtp - (512 - 22) * expert)
    assert shares["bf16"].flops == 2 * passed


@pytest.mark.parametrize("recipe", ["tiny_nvfp4", "nano_nvfp4", "super_nvfp4", "ultra_nvfp4"])
@pytest.mark.parametrize("repeated", ["true", "false"])
def test_shares_are_of_the_whole_and_the_rest_is_small(recipe: str, repeated: str) -> None:
    run = resolved(f"recipe={recipe}", f"model.mtp_use_repeated_layer={repeated}")
    shares = format_shares(run.precision_plan, run.model, 8192)
    counts = count_parameters(run.model)
    assert sum(share.parameters for share in shares) == counts.total + counts.mtp
    assert 3 * sum(share.flops for share in shares) == flops_per_token(run.model, 8192)
    assert 0 < shares[-1].parameters < 0.01 * counts.total
    # Scores and scan, as ``config.sizes`` counts them: with both MTP depths where there are any.
    layers = run.model.pattern + run.model.mtp_depths * run.model.mtp_pattern
    scores = 2 * 8192 * run.model.num_attention_heads * run.model.kv_channels
    scan = 7 * run.model.mamba_num_heads * run.model.mamba_head_dim * run.model.mamba_state_dim
    assert shares[-1].flops == layers.count("*") * scores + layers.count("M") * scan


def test_the_table_shows_every_group_and_its_reason(super_run: Run) -> None:
    console = Console(file=StringIO(), width=180)
    console.print(precision_table(super_run.precision_plan, super_run.precision))
    assert isinstance(console.file, StringIO)
    shown = console.file.getvalue()
    assert "role mamba.out_proj (up to 40 % flush to zero in NVFP4)" in shown
    assert "layers last 15% (stability)" in shown
    assert "74-87" in shown


@pytest.mark.parametrize(
    ("overrides", "parts", "absent"),
    [
        (["recipe=super_nvfp4"], ["router fp32", "16x16", "Hadamard transform of 16", "native on Blackwell"], "FP32, "),
        (
            ["recipe=tiny_nvfp4"],
            ["parameters and activations are FP32", "auto: emulated, because of precision.dtype=fp32"],
            "native on",
        ),
        (["recipe=super_nvfp4", "model.spec=torch"], ["auto: emulated, because of model.spec=torch"], "native on"),
        (["recipe=super_nvfp4", "precision=no_hadamard"], ["no Hadamard transform"], "transform of 16"),
        (["recipe=super_nvfp4", "precision=no_2d_scaling"], ["weights in 1x16 blocks"], "16x16"),
        (["recipe=super_nvfp4", "precision=no_stochastic_rounding"], ["to nearest"], "stochastically"),
        (["recipe=super_nvfp4", "precision.backend=native"], ["Backend native: Transformer Engine"], "auto"),
        (["recipe=super_nvfp4", "precision.backend=emulated"], ["around GEMMs in bf16"], "Blackwell"),
        (["recipe=super_bf16"], ["embedding bf16"], "Backend"),
    ],
)
def test_notes(overrides: list[str], parts: list[str], absent: str) -> None:
    run = resolved(*overrides)
    text = "\n".join(notes(run))
    assert all(part in text for part in parts)
    assert absent not in text


@pytest.mark.parametrize("recipe", ["tiny_nvfp4", "nano_nvfp4", "super_nvfp4", "ultra_nvfp4"])
def test_the_map_is_coloured_by_format(recipe: str, tmp_path: Path) -> None:
    """Areas of the colours are as the modules of the formats: each has one cell of one size."""
    run = resolved(f"recipe={recipe}")
    plan = run.precision_plan
    draw_precision_map(tmp_path / "map.png", plan, recipe, "test")
    pixels = imread(tmp_path / "map.png")[..., :3]
    below_legend = pixels[round(0.95 * 160) :]  # the legend has the colours too, in the first 0.95 inches of 160 pixels
    areas = {
        name: np.isclose(below_legend, to_rgb(colour), atol=1 / 255).all(axis=-1).sum()
        for name, colour in _COLOURS.items()
    }
    cell = sum(areas.values()) / len(plan.rows)
    for name, area in areas.items():
        modules = sum(row.format == name for row in plan.rows)
        # Lines between blocks and antialiased edges take their share of a cell.
        assert area / cell == pytest.approx(modules, rel=0.06)
