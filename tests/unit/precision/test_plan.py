"""Plans of whole models against the published table, Megatron-Bridge's matchers and really built modules."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config import Recipe, UserError, compose, resolve
from nemotron3_megatron.config.compose import RECIPES
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.precision.modules import linear_modules
from nemotron3_megatron.precision.operands import Operand
from nemotron3_megatron.precision.parse import parse_policy
from nemotron3_megatron.precision.plan import PrecisionPlan, precision_plan
from nemotron3_megatron.precision.shapes import weight_shape

TAIL = "{layers: last 15%, format: bf16}"
ATTENTION = "{role: [attention.qkv, attention.proj], format: bf16}"
LATENT = "{role: [moe.latent_down, moe.latent_up], format: bf16, optional: true}"
MTP = "{block: mtp, format: bf16, optional: true}"
MAMBA_OUT = "{role: mamba.out_proj, format: mxfp8}"
PUBLISHED = (TAIL, ATTENTION, LATENT, MTP, MAMBA_OUT)


def data(*rules: str, default: str = "nvfp4", **nvfp4: Any) -> dict[str, Any]:
    return {"default": default, "rules": [yaml.safe_load(rule) for rule in rules], "nvfp4": nvfp4}


def plan(model: ModelConfig, *rules: str, default: str = "nvfp4", **nvfp4: Any) -> PrecisionPlan:
    return precision_plan(parse_policy(data(*rules, default=default, **nvfp4)), model)


def formats(precision: PrecisionPlan) -> dict[str, str]:
    return {row.module: row.format for row in precision.rows}


@pytest.fixture(scope="module")
def models() -> dict[str, ModelConfig]:
    recipes = {"tiny": "tiny", "nano": "nano_bf16", "super": "super_bf16"}
    built = {name: compose([f"recipe={recipe}"])[0].model for name, recipe in recipes.items()}
    return built | {"ultra": compose(["recipe=super_bf16", "model=ultra"])[0].model}


def bridge_format(module: str, first_tail_layer: int) -> str:
    """Megatron-Bridge's ``te_quant.cfg`` in its order, under NVFP4 with ``num_layers_at_end_in_bf16``.

    In the tail no quantised context is open, and overrides act only inside one.
    """
    matchers = {
        "*.linear_qkv": "bf16",
        "*.linear_proj": "bf16",
        "*mlp.fc[12]_latent_proj": "bf16",
        "mtp.*": "bf16",
        "*mixer.out_proj": "mxfp8",
    }
    layer = re.match(r"decoder\.layers\.(\d+)\.", module)
    if layer and int(layer[1]) >= first_tail_layer:
        return "bf16"
    return next((chosen for pattern, chosen in matchers.items() if fnmatchcase(module, pattern)), "nvfp4")


@pytest.mark.parametrize(("name", "tail"), [("super", 14), ("ultra", 16), ("nano", 8)])
def test_published_policy_equals_bridge_matchers_and_tail(models: dict[str, ModelConfig], name: str, tail: int) -> None:
    chosen = formats(plan(models[name], *PUBLISHED))
    first = len(models[name].pattern) - tail
    assert chosen == {module: bridge_format(module, first) for module in chosen}


def test_super_equals_the_published_table(models: dict[str, ModelConfig]) -> None:
    precision = plan(models["super"], *PUBLISHED)
    for row in precision.rows:
        tail = row.layer is not None and row.layer >= 74
        bf16 = tail or row.block == "mtp" or row.role.startswith(("attention.", "moe.latent"))
        expected = "bf16" if bf16 else "mxfp8" if row.role == "mamba.out_proj" else "nvfp4"
        assert row.format == expected, row
    # 40 Mamba layers of 2 linears, 8 attention of 2, 40 MoE of 6, and MTP's eh_proj + 2 + 6.
    assert len(precision.rows) == 40 * 2 + 8 * 2 + 40 * 6 + 9
    # Tail: 6 Mamba, 1 attention, 7 MoE. NVFP4: in_proj of 34, four linears of 33 MoE; MXFP8: out_proj of 34.
    assert Counter(row.format for row in precision.rows) == {"nvfp4": 34 + 33 * 4, "mxfp8": 34, "bf16": 145}


def test_every_row_says_which_rule_decided(models: dict[str, ModelConfig]) -> None:
    rules = {row.module: row.rule for row in plan(models["super"], *PUBLISHED).rows}
    assert rules["decoder.layers.0.mixer.in_proj"] == "default"
    assert rules["decoder.layers.0.mixer.out_proj"] == "role mamba.out_proj"
    assert rules["decoder.layers.7.self_attention.linear_qkv"] == "role attention.qkv, attention.proj"
    assert rules["decoder.layers.78.self_attention.linear_qkv"] == "layers last 15%"
    assert rules["mtp.layers.0.eh_proj"] == "block mtp"


def test_overridden_tails(models: dict[str, ModelConfig]) -> None:
    def first_of_tail(layers: str) -> int | None:
        rows = plan(models["super"], f"{{layers: {layers}, format: bf16}}").rows
        return min(row.layer for row in rows if row.format == "bf16" and row.layer is not None)

    assert first_of_tail("last 16") == 72  # super.sh
    assert first_of_tail("last 15%, rounding: nearest") == 75
    assert first_of_tail("last 15%, rounding: floor") == 75
    assert first_of_tail("last 15%, rounding: ceil") == 74


def quantised(model: ModelConfig, *rules: str, default: str = "nvfp4") -> Counter[str]:
    return Counter(row.format for row in plan(model, *rules, default=default).rows)


def test_ablations_of_formats(models: dict[str, ModelConfig]) -> None:
    model = models["super"]
    total = 345
    assert quantised(model) == {"nvfp4": total}
    assert quantised(model, default="mxfp8") == {"mxfp8": total}
    assert quantised(model, default="bf16") == {"bf16": total}
    no_mamba_out = quantised(model, TAIL, ATTENTION, LATENT, MTP)
    assert no_mamba_out == {"nvfp4": 34 * 2 + 33 * 4, "bf16": 145}
    only_proj = "{role: attention.proj, format: bf16}"
    qkv = quantised(model, TAIL, only_proj, LATENT, MTP, MAMBA_OUT)
    assert qkv == {"nvfp4": 166 + 7, "mxfp8": 34, "bf16": 145 - 7}
    # 8 % of 88 layers is 7.04: the 8 layers EMEMEMEM... from 80; 25 % is 22, from 66.
    for share, first in ((8, 80), (25, 66)):
        tail = f"{{layers: last {share}%, format: bf16}}"
        chosen = formats(plan(model, tail, *PUBLISHED[1:]))
        assert chosen == {module: bridge_format(module, first) for module in chosen}
    no_tail = formats(plan(model, *PUBLISHED[1:]))
    assert no_tail == {module: bridge_format(module, 88) for module in no_tail}


def operands(precision: PrecisionPlan, role: str) -> dict[tuple[str, str], Operand]:
    row = next(row for row in precision.rows if row.role == role)
    return {
        (gemm, operand.tensor): operand for gemm in ("fprop", "dgrad", "wgrad") for operand in getattr(row.gemms, gemm)
    }


NVFP4 = {  # block, rounding, Hadamard (Transformer Engine's table of quantisers)
    ("fprop", "input"): ((1, 16), "nearest", None),
    ("fprop", "weight"): ((16, 16), "nearest", None),
    ("dgrad", "gradient"): ((1, 16), "stochastic", None),
    ("dgrad", "weight"): ((16, 16), "nearest", None),
    ("wgrad", "gradient"): ((1, 16), "stochastic", 16),
    ("wgrad", "input"): ((1, 16), "nearest", 16),
}


def test_operands_of_each_format(models: dict[str, ModelConfig]) -> None:
    precision = plan(models["super"], *PUBLISHED)
    seen = operands(precision, "mamba.in_proj")
    assert {key: (o.block, o.rounding, o.hadamard) for key, o in seen.items()} == NVFP4
    assert {operand.format for operand in seen.values()} == {"nvfp4"}
    for role, number_format, block in (("mamba.out_proj", "mxfp8", (1, 32)), ("attention.qkv", "bf16", None)):
        seen = operands(precision, role)
        assert seen.keys() == NVFP4.keys()
        expected = {Operand(tensor=o.tensor, format=number_format, block=block) for o in seen.values()}
        assert set(seen.values()) == expected


@pytest.mark.parametrize(
    ("option", "changed"),
    [
        ({"hadamard": None}, {key: (*NVFP4[key][:2], None) for key in NVFP4 if key[0] == "wgrad"}),
        (
            {"stochastic_rounding": None},
            {key: (NVFP4[key][0], "nearest", NVFP4[key][2]) for key in NVFP4 if key[1] == "gradient"},
        ),
        ({"weight_block": [1, 16]}, {key: ((1, 16), *NVFP4[key][1:]) for key in NVFP4 if key[1] == "weight"}),
    ],
)
def test_ablations_of_nvfp4_change_their_operands_only(
    models: dict[str, ModelConfig], option: dict[str, Any], changed: dict[Any, Any]
) -> None:
    seen = operands(plan(models["super"], *PUBLISHED, **option), "mamba.in_proj")
    assert {key: (o.block, o.rounding, o.hadamard) for key, o in seen.items()} == NVFP4 | changed


def test_plan_as_data_and_folded(models: dict[str, ModelConfig]) -> None:
    precision = plan(models["super"], *PUBLISHED)
    rows = json.loads(json.dumps(precision.as_data()))
    assert rows[0] == {
        "module": "decoder.layers.0.mixer.in_proj",
        "layer": 0,
        "block": "decoder",
        "role": "mamba.in_proj",
        "format": "nvfp4",
        "rule": "default",
        "fprop": rows[0]["fprop"],
        "dgrad": rows[0]["dgrad"],
        "wgrad": rows[0]["wgrad"],
    }
    assert rows[0]["fprop"][1] == {
        "tensor": "weight",
        "format": "nvfp4",
        "block": [16, 16],
        "rounding": "nearest",
        "hadamard": None,
    }
    assert [row["layer"] for row in rows if row["module"].startswith("mtp.")] == [None] * 9
    folded = precision.folded()
    assert sum(row.modules for row in folded) == len(rows)
    assert folded[0].layers == tuple(i for i, symbol in enumerate(models["super"].pattern[:74]) if symbol == "M")
    assert len(folded) == 10 + 10 + 9  # roles before the tail, in it, and in MTP


FAILURES = {
    "{layers: 88, format: bf16}": (r"rules\[0\].layers=88", "87"),
    "{layers: 80-90, format: bf16}": ("layers 0 to 87", "80-87"),
    "{layers: last 100, format: bf16}": ("has 88 layers", "last 88"),
    "{layers: 0, role: attention.qkv, format: bf16}": ("none of these layers has attention.qkv", "layers: 78"),
    "{role: [mamba.out_proj, mlp.fc1], format: bf16}": ("the model has no mlp.fc1", "optional: true"),
    "{role: mtp.eh_proj, block: decoder, format: bf16}": ("the model's decoder has no mtp.eh_proj", "role: "),
    "{role: mtp.eh_proj, layers: 3, format: bf16}": ("only MTP has mtp.eh_proj", "without layers"),
    "{layers: last 1%, rounding: floor, format: bf16}": ("rounds to none", "last 1"),
}


@pytest.mark.parametrize("rule", FAILURES)
def test_a_rule_that_matches_nothing_is_refused(models: dict[str, ModelConfig], rule: str) -> None:
    message, nearest = FAILURES[rule]
    with pytest.raises(UserError, match=message) as caught:
        plan(models["super"], rule)
    assert nearest in (caught.value.nearest or "")


def test_a_rule_for_another_model_is_refused_unless_optional(models: dict[str, ModelConfig]) -> None:
    for rule, message in ((LATENT, "no moe.latent_down"), (MTP, "the model has no mtp")):
        required = rule.replace(", optional: true", "")
        with pytest.raises(UserError, match=message):
            plan(models["nano"], required)
        assert formats(plan(models["nano"], rule)) == formats(plan(models["nano"]))


def test_a_rule_hidden_by_earlier_ones_is_refused(models: dict[str, ModelConfig]) -> None:
    with pytest.raises(UserError, match=r"rules\[2\] \(layers 78; role attention.qkv\).*rules\[1\]") as caught:
        plan(models["super"], MTP, ATTENTION, "{layers: 78, role: attention.qkv, format: nvfp4}")
    assert caught.value.nearest == "put it before precision.rules[1]"


RULES = st.fixed_dictionaries(
    {"format": st.sampled_from(["nvfp4", "mxfp8", "bf16"]), "optional": st.just(True)},
    optional={
        "layers": st.sampled_from(["0", "2-5", "first 3", "last 15%", "last 4"]),
        "role": st.sampled_from(["mamba.in_proj", "attention.qkv", "moe.experts.fc1", "mtp.eh_proj"]),
    },
).filter(lambda rule: len(rule) > 2)


@given(rules=st.lists(RULES, max_size=4))
def test_the_first_rule_that_selects_a_module_decides(models: dict[str, ModelConfig], rules: list[Any]) -> None:
    depth = len(models["tiny"].pattern)
    layers = {
        "0": [0],
        "2-5": [2, 3, 4, 5],
        "first 3": [0, 1, 2],
        "last 15%": [depth - 2, depth - 1],
        "last 4": list(range(depth - 4, depth)),
    }
    precision = precision_plan(parse_policy({"default": "bf16", "rules": rules}), models["tiny"])
    for row in precision.rows:
        expected = "bf16"
        for rule in reversed(rules):
            in_layers = "layers" not in rule or row.layer in layers[rule["layers"]]
            if in_layers and rule.get("role", row.role) == row.role:
                expected = rule["format"]
        assert row.format == expected


@pytest.fixture
def built_linears() -> Iterator[Callable[[Recipe], dict[str, tuple[int, ...]]]]:
    """Weight shapes of the linears of Megatron-Core's model, by module, built on one rank in this process."""
    from nemotron3_megatron.model.builder import build_model
    from nemotron3_megatron.parallel.groups import start_groups, stop_groups
    from nemotron3_megatron.platform import select

    platform = select("cpu")

    def build(recipe: Recipe) -> dict[str, tuple[int, ...]]:
        run = resolve(recipe, world_size=1)
        platform.start(0)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        (chunk,) = build_model(run, platform, start_groups(run, platform))
        return {
            re.sub(r"\.weight\d*$", "", name): tuple(weight.shape)
            for name, weight in chunk.named_parameters()
            if re.search(r"\.weight\d*$", name) and weight.dim() == 2
        }

    yield build
    stop_groups()


@pytest.mark.parametrize("repeated", [True, False])
def test_rows_are_the_linears_of_the_built_model(
    built_linears: Callable[[Recipe], dict[str, tuple[int, ...]]], repeated: bool
) -> None:
    overrides = ["parallel=single", "device=cpu", "model.spec=torch", "model.ffn_hidden_size=96"]
    recipe = compose(["recipe=tiny", *overrides])[0]
    # Every width another, so that none can stand for another.
    model = replace(
        recipe.model,
        pattern="MEM*E-",
        mtp_use_repeated_layer=repeated,
        moe_ffn_hidden_size=160,
        moe_shared_expert_intermediate_size=224,
    )
    outside = re.compile(r"embedding\.word_embeddings|output_layer|.*\.router")
    built = built_linears(replace(recipe, model=model))
    expected = {module.name: weight_shape(module.role, model) for module in linear_modules(model)}
    assert expected == {name: shape for name, shape in built.items() if not outside.fullmatch(name)}


POLICIES = {  # what each has in Super, tail and MTP included
    "nemotron3_nvfp4": {"nvfp4": 166, "mxfp8": 34, "bf16": 145},
    "all_nvfp4": {"nvfp4": 345},
    "mxfp8": {"mxfp8": 345},
    "bf16": {"bf16": 345},
    "fp32": {"bf16": 345},
    "no_hadamard": {"nvfp4": 166, "mxfp8": 34, "bf16": 145},
    "no_stochastic_rounding": {"nvfp4": 166, "mxfp8": 34, "bf16": 145},
    "no_2d_scaling": {"nvfp4": 166, "mxfp8": 34, "bf16": 145},
    "mamba_out_nvfp4": {"nvfp4": 166 + 34, "bf16": 145},
    "qkv_nvfp4": {"nvfp4": 166 + 7, "mxfp8": 34, "bf16": 145 - 7},
    # The tail's layers 74 to 87 hold 6 Mamba, 1 attention and 7 MoE layers; without it, in_proj and experts of these
    # are NVFP4 and out_proj MXFP8. 8 % keeps 80 to 87: 4 Mamba and 4 MoE; 25 % keeps 66 to 87: 10, 2 and 10.
    "tail_0pct": {"nvfp4": 166 + 6 + 4 * 7, "mxfp8": 40, "bf16": 145 - 12 - 4 * 7},
    "tail_8pct": {"nvfp4": 40 - 4 + 4 * (40 - 4), "mxfp8": 36, "bf16": 145 - 2 * 2 - 4 * 3},
    "tail_25pct": {"nvfp4": 40 - 10 + 4 * (40 - 10), "mxfp8": 30, "bf16": 145 + 2 * 4 + 4 * 3},
}


def test_every_policy_of_the_recipes_is_known() -> None:
    assert POLICIES.keys() == {path.stem for path in (RECIPES / "precision").glob("*.yaml")}


@pytest.mark.parametrize("name", POLICIES)
def test_policies_of_the_recipes(models: dict[str, ModelConfig], name: str) -> None:
    policy = compose(["recipe=super_bf16", f"precision={name}"])[0].precision
    assert policy.name == name
    for model in models.values():
        precision_plan(policy, model)
    assert Counter(row.format for row in precision_plan(policy, models["super"]).rows) == POLICIES[name]


@pytest.mark.parametrize("name", ["no_hadamard", "no_stochastic_rounding", "no_2d_scaling"])
def test_ablations_of_nvfp4_are_the_published_table_but_for_one_switch(name: str) -> None:
    published = compose(["recipe=super_bf16", "precision=nemotron3_nvfp4"])[0].precision
    ablation = compose(["recipe=super_bf16", f"precision={name}"])[0].precision
    assert (ablation.default, ablation.rules) == (published.default, published.rules)
    changed = {
        "no_hadamard": {"hadamard": None},
        "no_stochastic_rounding": {"stochastic_rounding": None},
        "no_2d_scaling": {"weight_block": (1, 16)},
    }[name]
    assert ablation.nvfp4 == replace(published.nvfp4, **changed)  # type: ignore[arg-type]


@pytest.mark.parametrize("pp", [1, 2, 4, 8])
def test_super_is_the_published_table_under_every_pipeline(pp: int) -> None:
    recipe, origins = compose(["recipe=super_nvfp4", f"parallel.pp={pp}"])
    run = resolve(recipe, 3072, origins)
    assert run.layout.hybrid_layer_pattern.count("|") == pp - 1
    chosen = formats(run.precision_plan)
    assert len(chosen) == 345
    assert chosen == {module: bridge_format(module, 88 - 14) for module in chosen}
