"""Composition: precedence, strictness, single writers, places."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nemotron3_megatron.config.compose import RECIPES, compose
from nemotron3_megatron.config.errors import UserError

Write = Callable[[str, str], Path]
HEADER = "# @package _global_\n"
BODY = """defaults:
  - override /model: tiny
  - override /data: quickstart
stages: {main: {tokens: 1M tokens, seq_length: 256, global_batch_size: 16}}
optimizer: {lr: 0.001, min_lr: 0.0001, lr_wsd_decay: 10 steps}
"""


def refused(overrides: list[str], recipes: Path | None = None) -> UserError:
    with pytest.raises(UserError) as caught:
        compose(overrides, recipes) if recipes else compose(overrides)
    return caught.value


def test_recipe_overrides_its_groups_and_the_command_line_overrides_all() -> None:
    recipe, origins = compose(["recipe=tiny", "telemetry.eval_batches=3", "precision=bf16"])
    places = {origin.key: origin.place for origin in origins}
    assert recipe.telemetry.eval_batches == 3
    assert places["telemetry.eval_batches"] == "command line"
    assert recipe.precision.dtype == "bf16"
    assert str(recipe.checkpoint.every) == "100 steps"  # checkpoint/default.yaml says 1000
    assert places["checkpoint.every"].startswith("recipes/recipe/tiny.yaml:")


def test_origins_name_the_line() -> None:
    _, origins = compose(["recipe=tiny"])
    for origin in origins:
        file, line = origin.place.split(":")
        text = Path(file).read_text().splitlines()[int(line) - 1]
        assert text.strip().startswith(origin.key.split(".")[-1] + ":")


def test_name_is_the_recipe_s_file_unless_set() -> None:
    assert compose(["recipe=tiny"])[0].name == "tiny"
    assert compose(["recipe=tiny", "name=mine"])[0].name == "mine"


def test_values_no_file_mentions_can_be_set() -> None:
    assert compose(["recipe=tiny", "model.ffn_hidden_size=512"])[0].model.ffn_hidden_size == 512


def test_sources_can_be_replaced() -> None:
    recipe, _ = compose(["recipe=tiny", "~data.sources.train", "data.sources.wiki.path=/data/wiki"])
    assert list(recipe.data.sources) == ["wiki"]


@pytest.mark.parametrize(
    ("override", "what", "nearest"),
    [
        ("model.hiden_size=3", "model.hiden_size", "model.hidden_size"),
        ("optimiser.lr=1", "optimiser", "optimizer"),
        ("model.hidden_size=3.0", "model.hidden_size=3.0", "model.hidden_size=3"),
        ("model.hidden_size=abc", "model.hidden_size=abc", None),
        ("model.hidden_size='128'", "model.hidden_size=128", "model.hidden_size=128 (without quotes)"),
        ("model.hidden_size=true", "model.hidden_size=true", None),
        ("model.mtp_use_repeated_layer=1", "model.mtp_use_repeated_layer=1", "model.mtp_use_repeated_layer=true"),
        ("optimizer.lr=.inf", "optimizer.lr", None),
        ("optimizer.lr=null", "optimizer.lr=null", None),
        ("optimizer.lr_decay_style=WSDD", "optimizer.lr_decay_style=WSDD", "optimizer.lr_decay_style=WSD"),
        ("checkpoint.every=5", "checkpoint.every=5", "checkpoint.every='5 steps'"),
        ("checkpoint.every='5 stps'", "checkpoint.every=5 stps", "500 steps"),
        ("checkpoint=defualt", "checkpoint=defualt", "checkpoint=default"),
        ("recipe=tinny", "recipe", None),
        ("name=???", "name", "name=<text>"),
        ("data.sources=[a]", "data.sources", None),
        ("parallel.recompute_modules=moe", "parallel.recompute_modules=moe", "parallel.recompute_modules=[moe]"),
        ("nonsense", "nonsense", "nonsense=value"),
        ("run_dir=5", "run_dir=5", """'"5"'"""),
        ("stages={}", "stages={}", "~stages"),
        ("stages.mian.seq_length=128", "stages.mian", "stages.main or stages.mian.tokens=<duration>"),
        ("data.sources.wiki.weight=2", "data.sources.wiki", "data.sources.train or data.sources.wiki.path=<text>"),
        ("~data.validaton", "~data.validaton", "~data.validation"),
        ("parallel=null", "parallel=null", None),
        ("=5", "=5", "a key of"),
        ("hydra.verbose=true", "hydra.verbose=true", "a key of"),
        ("seed=1,2", "seed=1,2", "train.py -m"),
    ],
)  # fmt: skip
def test_wrong_command_line(override: str, what: str, nearest: str | None) -> None:
    error = refused(["recipe=tiny", override])
    assert error.what.startswith(what)
    assert error.where == "command line"
    assert error.why
    assert nearest is None or nearest in str(error.nearest)


def test_no_recipe_lists_those_there_are() -> None:
    assert "tiny" in str(refused([]))


def test_two_writers_on_the_command_line() -> None:
    assert "twice" in str(refused(["recipe=tiny", "seed=1", "seed=2"]))
    assert "twice" in str(refused(["recipe=tiny", "model=nano", "model=super"]))
    assert "twice" in str(refused(["recipe=tiny", "data.sources={a: {path: x}}", "data.sources.a.path=y"]))


def test_two_group_files_writing_one_value_are_both_named(write_recipe: Write) -> None:
    tree = write_recipe("telemetry/loud.yaml", HEADER + "checkpoint:\n  keep_last: 9\n")
    error = refused(["recipe=tiny", "telemetry=loud"], tree)
    assert error.what == "checkpoint.keep_last"
    assert error.where == "recipes/checkpoint/default.yaml:3 and recipes/telemetry/loud.yaml:3"


def test_a_file_may_override_what_it_includes(write_recipe: Write) -> None:
    tree = write_recipe("model/wide.yaml", "defaults: [tiny, _self_]\nhidden_size: 256\n")
    recipe, origins = compose(["recipe=tiny", "model=wide"], tree)
    assert recipe.model.hidden_size == 256
    assert any(origin.place == "recipes/model/wide.yaml:2" for origin in origins)


def test_a_recipe_may_build_on_a_recipe(write_recipe: Write) -> None:
    tree = write_recipe(
        "recipe/longer.yaml", HEADER + "defaults: [tiny, _self_]\nstages: {main: {tokens: 9M tokens}}\n"
    )
    recipe, _ = compose(["recipe=longer"], tree)
    assert (str(recipe.stages["main"].tokens), recipe.stages["main"].seq_length) == ("9M tokens", 256)


@pytest.mark.parametrize(
    ("text", "place", "part"),
    [
        (HEADER + BODY + "seed: [1\n", "recipes/recipe/broken.yaml:8", "YAML"),
        (
            HEADER + BODY + "seed: 1\nseed: 2\n",
            "recipes/recipe/broken.yaml:7 and recipes/recipe/broken.yaml:8",
            "twice",
        ),
        (HEADER + BODY + "sed: 1\n", "recipes/recipe/broken.yaml:7", "no such key"),
        (HEADER + BODY + "seed: one\n", "recipes/recipe/broken.yaml:7", "integer"),
        (HEADER + BODY + "checkpoint.every: 5 steps\n", "recipes/recipe/broken.yaml:7", "dotted"),
        (HEADER + BODY + "max_steps: ${nothing}\n", None, "nothing"),
        (HEADER + BODY + "1: 2\n", None, "text name"),
        (HEADER + BODY.replace("/model: tiny", "/model: tyny"), "recipes/recipe/broken.yaml:3", "tiny"),
        (HEADER + BODY.replace("/model: tiny", "/modle: tiny"), "recipes/recipe/broken.yaml:3", "/model"),
        (HEADER + BODY.replace("lr: 0.001, ", ""), None, "required"),
        (HEADER + "seed: 1\n", None, "model"),
        ("- 1\n- 2\n", "recipes/recipe/broken.yaml", "mapping"),
        ("\t\x00", "recipes/recipe/broken.yaml", ""),
        ("", None, ""),
    ],
)
def test_broken_recipes_end_in_one_clear_message(write_recipe: Write, text: str, place: str | None, part: str) -> None:
    error = refused(["recipe=broken"], write_recipe("recipe/broken.yaml", text))
    assert part in str(error)
    assert place is None or str(error).count(place)


KEYS = st.sampled_from(
    ["model.hidden_size", "model.pattern", "checkpoint.every", "optimizer.lr", "stages.main.tokens", "data.sources",
     "parallel.recompute_modules", "precision", "seed", "nonsense", "model", "recipe", "stages", "~data", "@", "+seed"]
)  # fmt: skip
VALUES = st.one_of(
    st.sampled_from(
        ["", "null", "???", "1e3", "[1", "{a: 1}", "${x}", "'", "5 steps", "true", "nan", "1,2", "\\", "glob(*)"]
    ),
    st.text(max_size=12),
    st.integers().map(str),
)


@given(st.lists(st.builds(lambda key, value: f"{key}={value}", KEYS, VALUES), max_size=3))
@settings(max_examples=30, deadline=None)
def test_any_command_line_composes_or_is_refused(overrides: list[str]) -> None:
    with suppress(UserError):
        compose(["recipe=tiny", *overrides])


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_damaged_recipe_composes_or_is_refused(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    tree = tmp_path_factory.mktemp("tree") / "recipes"
    shutil.copytree(RECIPES, tree)
    file = tree / data.draw(st.sampled_from(["recipe/tiny.yaml", "model/tiny.yaml", "data/quickstart.yaml"]))
    text = file.read_text()
    at = data.draw(st.integers(0, len(text)))
    cut = data.draw(st.integers(0, 20))
    junk = data.draw(st.text(max_size=5))
    file.write_bytes((text[:at] + junk + text[at + cut :]).encode("utf-8", "surrogatepass"))
    with suppress(UserError):
        compose(["recipe=tiny"], tree)
