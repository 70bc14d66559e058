"""Precision in a recipe: how it is written, where mistakes are blamed, what a plan demands of the rest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config import Run, compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.legality import with_value
from nemotron3_megatron.config.recipe import PrecisionConfig
from nemotron3_megatron.config.serialize import from_json, to_json
from nemotron3_megatron.precision.plan import PrecisionPlan, precision_plan
from nemotron3_megatron.precision.policy import Hadamard, Nvfp4, Rule

Write = Callable[[str, str], Path]
HEADER = "name: mine\ndefault: nvfp4\nrules:\n"
TINY = compose(["recipe=tiny_nvfp4"])[0]
POLICIES = [compose(["recipe=tiny_nvfp4", f"precision={name}"])[0].precision for name in ("bf16", "mxfp8", "all_nvfp4")]


def resolved(*overrides: str, recipes: Path | None = None) -> Run:
    recipe, origins = compose(overrides, recipes) if recipes else compose(overrides)
    return resolve(recipe, recipe.world_size or 1, origins)


def refused(*overrides: str, recipes: Path | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        resolved(*overrides, recipes=recipes)
    return caught.value


def formats(plan: PrecisionPlan) -> dict[str, str]:
    return {row.module: row.format for row in plan.rows}


def test_a_rule_may_be_written_with_one_value_or_several(write_recipe: Write) -> None:
    text = HEADER + (
        "  - {layers: 3, role: attention.qkv, format: mxfp8}\n"
        "  - layers: [0, first 2]\n"
        "    format: bf16\n"
        "nvfp4: {hadamard: {size: 16, on: wgrad_inputs}}\n"  # YAML 1.1 reads this `on` as true
    )
    precision = compose(["recipe=tiny_nvfp4", "precision=mine"], write_recipe("precision/mine.yaml", text))[0].precision
    assert precision.rules == (
        Rule(format="mxfp8", layers=("3",), role=("attention.qkv",)),
        Rule(format="bf16", layers=("0", "first 2")),
    )
    assert precision.nvfp4 == Nvfp4(hadamard=Hadamard(on="wgrad_inputs"))


def test_the_command_line_changes_a_policy() -> None:
    run = resolved(
        "recipe=super_nvfp4",
        "precision.default=mxfp8",
        "precision.nvfp4.stochastic_rounding=null",
        "precision.nvfp4.hadamard=null",
    )
    assert run.precision.nvfp4 == Nvfp4(hadamard=None, stochastic_rounding=None)
    assert set(formats(run.precision_plan).values()) == {"mxfp8", "bf16"}
    places = {origin.key: origin.place for origin in run.origins}
    assert places["precision.default"] == places["precision.nvfp4.hadamard"] == "command line"

    run = resolved("recipe=super_nvfp4", "precision.rules=[{layers: last 15%, format: bf16}]")
    assert run.precision.rules == (Rule(format="bf16", layers=("last 15%",)),)
    assert {row.layer for row in run.precision_plan.rows if row.format == "bf16"} == set(range(74, 88))


def test_each_rule_has_the_line_it_was_written_on() -> None:
    _, origins = compose(["recipe=super_nvfp4", "precision.rules.3.format=mxfp8"])
    rules = [origin for origin in origins if origin.key.startswith("precision.rules[")]
    assert [rule.key for rule in rules] == [f"precision.rules[{index}]" for index in range(5)]
    assert (rules[3].place, rules[3].value) == (
        "command line",
        "{format: mxfp8, block: mtp, optional: true, why: preserves MTP}",
    )
    file, line = rules[4].place.split(":")
    assert "mamba.out_proj" in Path(file).read_text().splitlines()[int(line) - 1]


def test_the_record_of_a_run_holds_its_policy() -> None:
    run = resolved("recipe=super_nvfp4")
    again = from_json(to_json(run))
    assert again.precision == run.precision
    assert again.precision_plan == run.precision_plan == precision_plan(run.precision, run.model)


@pytest.mark.parametrize(
    ("rules", "line", "what", "nearest"),
    [
        ("  - {layers: 3, format: nvpf4}\n", 4, "precision.rules[0].format=nvpf4", "precision.rules[0].format=nvfp4"),
        ("  - {layers: 3, format: bf16}\n  - format: bf16\n    role: mamba.outproj\n", 6,
         "precision.rules[1].role[0]=mamba.outproj", "precision.rules[1].role[0]=mamba.out_proj"),
        ("  - format: bf16\n    role:\n      - mamba.in_proj\n      - router\n", 5,
         "precision.rules[0].role=router", "the rule without router"),
        ("  - {layers: 3}\n", 4, "precision.rules[0].format", "precision.rules[0].format=<nvfp4 | mxfp8 | bf16>"),
        ("  - {layer: 3, format: bf16}\n", 4, "precision.rules[0].layer", "precision.rules[0].layers"),
        ("  - {layers: 3, format: bf16}\n  - {layers: 10, format: bf16}\n", 5, "precision.rules[1].layers=10", "9"),
        ("  - {layers: 9-3, format: bf16}\n", 4, "precision.rules[0].layers=9-3", "3-9"),
        ("  - {role: mlp.fc1, format: bf16}\n", 4, "precision.rules[0] (role mlp.fc1)", "optional: true"),
        ("  - {layers: 0-9, format: bf16}\n  - {layers: 3, format: mxfp8}\n", 5, "precision.rules[1] (layers 3)",
         "put it before precision.rules[0]"),
        ("  []\nnvfp4: {weight_block: [32, 32]}\n", 5, "precision.nvfp4.weight_block=[32, 32]", "[16, 16]"),
        ("  []\nnvfp4:\n  hadamard: {size: 32}\n", 6, "precision.nvfp4.hadamard.size=32", "size=16"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_policy_names_its_line(
    write_recipe: Write, rules: str, line: int, what: str, nearest: str
) -> None:
    error = refused("recipe=tiny_nvfp4", "precision=mine", recipes=write_recipe("precision/mine.yaml", HEADER + rules))
    assert error.where == f"recipes/precision/mine.yaml:{line}"
    assert error.what == what
    assert nearest in str(error.nearest)


@pytest.mark.parametrize(
    ("override", "what", "nearest"),
    [
        ("precision.default=nvpf4", "precision.default=nvpf4", "precision.default=nvfp4"),
        ("precision.rules=[{role: mamba.outproj, format: bf16}]", "precision.rules[0].role[0]", "mamba.out_proj"),
        ("precision.rules=[{layers: 90, format: bf16}]", "precision.rules[0].layers=90", "87"),
        ("precision.rules=3", "precision.rules=3", "precision.rules=[3]"),
        ("precision.nvfp4.hadamard.size=32", "precision.nvfp4.hadamard.size=32", "precision.nvfp4.hadamard.size=16"),
        ("precision=nemotron3", "precision=nemotron3", "precision=nemotron3_nvfp4"),
        ("model.hidden_size=4100", "model.hidden_size=4100", "model.hidden_size=4096"),
        ("model.mamba_num_heads=136", "model.mamba_num_heads=136", "model.mamba_num_heads=128"),
        ("model.moe_shared_expert_intermediate_size=5380", "model.moe_shared_expert_intermediate_size=5380", "=5376"),
        ("model.moe_latent_size=1030", "model.moe_latent_size=1030", "model.moe_latent_size=1024"),
        ("parallel.tp=16", "parallel.tp=16", "parallel.tp=8"),
        # 4112 tokens on each of 2 sequence-parallel ranks: 257 blocks of NVFP4, 128.5 of MXFP8.
        ("stages.phase1.seq_length=8224", "stages.phase1.seq_length=8224", "stages.phase1.seq_length=8192"),
    ],
)
def test_a_mistake_on_the_command_line_is_named_with_the_nearest_legal(override: str, what: str, nearest: str) -> None:
    error = refused("recipe=super_nvfp4", override)
    assert error.what.startswith(what)
    assert error.where == "command line"
    assert error.why
    assert nearest in str(error.nearest)


def test_a_width_that_does_not_fit_names_module_rule_and_the_way_out() -> None:
    error = refused("recipe=nano_nvfp4", "parallel.tp=8")
    assert (error.what, error.where) == ("parallel.tp=8", "command line")
    # 10304 outputs over 8 ranks, 80.5 blocks of 16.
    assert "decoder.layers.0.mixer.in_proj in nvfp4 (rule: default) has 1288 outputs on each of 8 ranks" in error.why
    assert "{role: mamba.in_proj, format: bf16}" in error.why
    assert "parallel.tp=4" in str(error.nearest)
    way_out = "precision.rules=[{role: [mamba.in_proj, mamba.out_proj], format: bf16}]"
    resolved("recipe=nano_nvfp4", "parallel.tp=8", way_out)
    # The value is in a file: so is the place.
    error = refused("recipe=tiny", "precision=all_nvfp4")
    assert (error.what, error.where) == ("model.mamba_num_heads=8", "recipes/model/tiny.yaml:8")


@pytest.mark.parametrize(
    ("overrides", "what", "why"),
    [
        (["recipe=tiny", "precision.backend=native"], "precision.backend=native", "quantises nothing"),
        (["recipe=super_bf16", "precision.backend=emulated"], "precision.backend=emulated", "quantises nothing"),
        (["recipe=tiny_nvfp4", "precision.backend=native"], "precision.backend=native", "BF16"),
        (["recipe=super_nvfp4", "precision.backend=native", "precision.dtype=fp32"], "precision.", "BF16"),
        (["recipe=super_nvfp4", "precision.backend=native", "device=cpu"], "precision.backend=native", "GPU"),
        (["recipe=super_nvfp4", "precision.backend=native", "model.spec=torch"], "precision.", "Transformer Engine"),
    ],
)
def test_backends_that_cannot_be(overrides: list[str], what: str, why: str) -> None:
    error = refused(*overrides)
    assert error.what.startswith(what)
    assert why in error.why
    assert error.where == "command line"
    assert "precision.backend=" in str(error.nearest)


def test_backends_that_can_be() -> None:
    resolved("recipe=tiny_nvfp4", "precision.backend=emulated")
    resolved("recipe=super_nvfp4", "precision.backend=native", "model.spec=te", "device=cuda")


@given(
    policy=st.sampled_from(POLICIES),
    seq_length=st.integers(1, 40).map(lambda blocks: 4 * blocks),
    micro_batch_size=st.sampled_from([1, 2, 4]),
    tp=st.sampled_from([1, 2]),
    cp=st.sampled_from([1, 2]),
)
def test_the_tokens_of_every_rank_are_whole_blocks(
    policy: PrecisionConfig, seq_length: int, micro_batch_size: int, tp: int, cp: int
) -> None:
    recipe = replace(TINY, precision=policy)
    for key, value in {
        "parallel.tp": tp,
        "parallel.cp": cp,
        "parallel.ep": 1,
        "model.mamba_num_heads": 64,  # 1216 outputs of in_proj, 19 blocks of 32 on each of 2 ranks
        "stages.main.seq_length": seq_length,
        "stages.main.micro_batch_size": micro_batch_size,
    }.items():
        recipe = with_value(recipe, key, value)
    shard = seq_length * micro_batch_size // (cp * tp)  # tp > 1 is sequence parallel
    block = {"bf16": 1, "mxfp8": 32, "all_nvfp4": 16}[policy.name]
    if shard % block == 0:
        resolve(recipe, 4)
    else:
        with pytest.raises(UserError, match=rf"has {shard} tokens on a rank, no whole number of .* blocks of {block}"):
            resolve(recipe, 4)
