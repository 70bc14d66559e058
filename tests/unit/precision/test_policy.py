"""Policies as data: what parses to what, which layers a selector means, and what a user is told."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.serialize import plain
from nemotron3_megatron.precision.layers import IllegalLayersError, check_selector, round_share, select
from nemotron3_megatron.precision.parse import parse_policy
from nemotron3_megatron.precision.policy import Hadamard, Nvfp4, Policy, Rule

DEPTHS = st.integers(1, 200)


def policy(text: str) -> Policy:
    return parse_policy(yaml.safe_load(text))


def test_a_policy_is_what_its_yaml_says() -> None:
    parsed = policy("""
        default: nvfp4
        rules:
          - {layers: last 15%, format: bf16, why: stability}
          - {role: [attention.qkv, attention.proj], format: bf16}
          - {block: mtp, format: bf16, optional: true}
          - {role: mamba.out_proj, layers: [7, 10-12, first 2], block: decoder, format: mxfp8}
        nvfp4: {weight_block: [16, 16], hadamard: {size: 16, on: wgrad_inputs}, stochastic_rounding: gradients}
    """)
    assert parsed == Policy(
        default="nvfp4",
        rules=(
            Rule(format="bf16", layers=("last 15%",), why="stability"),
            Rule(format="bf16", role=("attention.qkv", "attention.proj")),
            Rule(format="bf16", block="mtp", optional=True),
            Rule(format="mxfp8", role=("mamba.out_proj",), layers=("7", "10-12", "first 2"), block="decoder"),
        ),
        nvfp4=Nvfp4(weight_block=(16, 16), hadamard=Hadamard(size=16), stochastic_rounding="gradients"),
    )
    assert [rule.label for rule in parsed.rules] == [
        "layers last 15%",
        "role attention.qkv, attention.proj",
        "block mtp",
        "layers 7, 10-12, first 2; block decoder; role mamba.out_proj",
    ]


def test_switches_of_nvfp4_can_be_off() -> None:
    parsed = policy("{default: nvfp4, nvfp4: {weight_block: [1, 16], hadamard: null, stochastic_rounding: null}}")
    assert parsed.nvfp4 == Nvfp4(weight_block=(1, 16), hadamard=None, stochastic_rounding=None)


@pytest.mark.parametrize("text", ["{default: bf16}", "{default: nvfp4, rules: [{layers: 3, format: mxfp8}]}"])
def test_a_policy_survives_being_written_and_read(text: str) -> None:
    parsed = policy(text)
    assert parse_policy(plain(parsed)) == parsed


@pytest.mark.parametrize(
    ("share", "layers"),
    # Published: Megatron-Bridge and Megatron-LM's release test (Super), ultra.sh; Nano has no published NVFP4 run.
    [(Fraction(15 * 88, 100), 14), (Fraction(15 * 108, 100), 16), (Fraction(15 * 52, 100), 8)],
)
def test_default_rounding_gives_the_published_tails(share: Fraction, layers: int) -> None:
    assert round_share(share, "even") == layers


@given(numerator=st.integers(1, 20000))
def test_rounding_is_to_a_neighbour_of_its_kind(numerator: int) -> None:
    share = Fraction(numerator, 100)
    whole = numerator % 100 == 0
    even = round_share(share, "even")
    assert even == share if whole else even == 1 or even % 2 == 0
    assert even >= 1
    assert abs(even - share) <= 1
    assert round_share(share, "ceil") == math.ceil(share)
    assert round_share(share, "floor") == math.floor(share)
    assert abs(round_share(share, "nearest") - share) <= Fraction(1, 2)


@given(depth=DEPTHS, data=st.data())
def test_ranges_and_ends_are_global_numbers(depth: int, data: st.DataObject) -> None:
    first = data.draw(st.integers(0, depth - 1))
    last = data.draw(st.integers(first, depth - 1))
    count = data.draw(st.integers(1, depth))
    everything = list(range(depth))
    assert list(select(f"{first}", depth, "even")) == [first]
    assert list(select(f"{first}-{last}", depth, "even")) == everything[first : last + 1]
    assert list(select(f"first {count}", depth, "even")) == everything[:count]
    assert list(select(f"last {count}", depth, "even")) == everything[-count:]


@given(depth=DEPTHS, percent=st.decimals("0.1", "100", places=1))
def test_a_share_counts_from_its_end(depth: int, percent: Any) -> None:
    check_selector(f"last {percent}%")
    tail = select(f"last {percent}%", depth, "ceil")
    head = select(f"first {percent}%", depth, "ceil")
    assert len(tail) == len(head) == math.ceil(Fraction(percent) * depth / 100)
    assert (tail.stop, head.start) == (depth, 0)


@given(text=st.text("0123456789-+%.flast ir", max_size=12), depth=DEPTHS)
def test_a_selector_selects_layers_of_the_model_or_is_refused_with_a_legal_one(text: str, depth: int) -> None:
    try:
        check_selector(text)
        chosen = select(text, depth, "even")
    except IllegalLayersError as error:
        nearest = error.nearest.partition(",")[0]
        check_selector(nearest)
    else:
        assert chosen
        assert set(chosen) <= set(range(depth))


ERRORS = {
    "{}": ("precision.default", "precision.default=<nvfp4 | mxfp8 | bf16>"),
    "{default: nvpf4}": ("precision.default=nvpf4", "precision.default=nvfp4"),
    "{default: bf16, rule: []}": ("precision.rule", "precision.rules"),
    "{default: bf16, rules: {a: 1}}": ("precision.rules=", None),
    "{default: bf16, rules: [nvfp4]}": ("precision.rules[0]=nvfp4", None),
    "{default: bf16, rules: [{block: mtp}]}": ("precision.rules[0].format", "<nvfp4 | mxfp8 | bf16>"),
    "{default: bf16, rules: [{block: mtp, format: fp8}]}": ("precision.rules[0].format=fp8", "mxfp8"),
    "{default: bf16, rules: [{block: encoder, format: nvfp4}]}": ("precision.rules[0].block=encoder", "decoder"),
    "{default: bf16, rules: [{role: mamba.outproj, format: nvfp4}]}": ("role[0]=mamba.outproj", "mamba.out_proj"),
    "{default: bf16, rules: [{role: router, format: nvfp4}]}": ("role=router", "without router"),
    "{default: bf16, rules: [{role: [], format: nvfp4}]}": ("role=[]", "leave role out"),
    "{default: bf16, rules: [{layer: 3, format: nvfp4}]}": ("precision.rules[0].layer", "precision.rules[0].layers"),
    "{default: bf16, rules: [{format: nvfp4}]}": ("precision.rules[0]", "default: nvfp4"),
    "{default: bf16, rules: [{layers: 15%, format: nvfp4}]}": ("layers=15%", "last 15%"),
    "{default: bf16, rules: [{layers: -3, format: nvfp4}]}": ("layers=-3", "last 3"),
    "{default: bf16, rules: [{layers: 9-3, format: nvfp4}]}": ("layers=9-3", "3-9"),
    "{default: bf16, rules: [{layers: last 0, format: nvfp4}]}": ("layers=last 0", "last 1"),
    "{default: bf16, rules: [{layers: last 1.5, format: nvfp4}]}": ("layers=last 1.5", "last 2"),
    "{default: bf16, rules: [{layers: first 150%, format: nvfp4}]}": ("layers=first 150%", "first 100%"),
    "{default: bf16, rules: [{layers: true, format: nvfp4}]}": ("layers[0]=true", None),
    "{default: bf16, rules: [{layers: 3, block: mtp, format: nvfp4}]}": ("block=mtp", "without layers"),
    "{default: bf16, rules: [{layers: 3, rounding: ceil, format: nvfp4}]}": ("rounding=ceil", "last 15%"),
    "{default: bf16, rules: [{layers: 3, optional: 1, format: nvfp4}]}": ("optional=1", "true"),
    "{default: nvfp4, nvfp4: {weight_block: [32, 32]}}": ("weight_block=[32, 32]", "weight_block=[16, 16]"),
    "{default: nvfp4, nvfp4: {hadamard: {size: 32}}}": ("hadamard.size=32", "hadamard.size=16"),
    "{default: nvfp4, nvfp4: {hadamard: {on: inputs}}}": ("hadamard.on=inputs", "wgrad_inputs"),
    "{default: nvfp4, nvfp4: {stochastic_rounding: weights}}": ("stochastic_rounding=weights", "gradients"),
}


@pytest.mark.parametrize("text", ERRORS)
def test_what_cannot_be_is_refused_with_its_name_and_the_nearest_legal(text: str) -> None:
    what, nearest = ERRORS[text]
    with pytest.raises(UserError) as caught:
        policy(text)
    assert what in caught.value.what
    if nearest is not None:
        assert nearest in (caught.value.nearest or "")


def test_an_error_names_the_place() -> None:
    with pytest.raises(UserError, match=r"recipes/precision/mine.yaml:precision.rules\[0\].layers"):
        parse_policy(
            {"default": "bf16", "rules": [{"layers": "9-3", "format": "nvfp4"}]},
            place=lambda key: f"recipes/precision/mine.yaml:{key}",
        )
