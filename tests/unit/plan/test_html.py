"""The plan's page, read back as HTML."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nemotron3_megatron.cli import main
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.plan.html import plan_page
from nemotron3_megatron.plan.report import as_json


class Page(HTMLParser):
    """What a browser would find."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.values: list[str] = []
        self.cells: list[list[str]] = []
        """By model chunk: kinds of layers."""
        self.texts: list[str] = []
        self.tags: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.sources += [found[name] for name in ("src", "href", "srcset", "data") if name in found]
        if tag == "data":
            self.values.append(found["value"])
        if found.get("class") == "cells":
            self.cells.append([])
        if found.get("class", "").startswith("cell "):
            self.cells[-1].append(found["class"].removeprefix("cell "))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def planned(*overrides: str) -> Run:
    recipe, origins = compose(list(overrides))
    return resolve(recipe, recipe.world_size or 1, origins)


def test_page_fetches_nothing_and_its_pictures_are_whole() -> None:
    text = plan_page(planned("recipe=tiny"))
    page = Page(text)
    assert len(page.sources) == 3  # precision, memory, schedule
    for source in page.sources:
        kind, _, data = source.partition(",")
        assert kind == "data:image/png;base64"
        png = base64.b64decode(data, validate=True)
        assert png.startswith(b"\x89PNG")
        assert png.endswith(b"IEND\xaeB`\x82")
    assert page.tags.isdisjoint({"script", "link", "iframe", "object"})
    assert "@import" not in text
    assert "url(" not in text


@pytest.mark.parametrize("recipe", ["tiny", "nano_bf16", "super_nvfp4"])
def test_key_figures_are_those_of_the_json(recipe: str) -> None:
    run = planned(f"recipe={recipe}")
    plan, page = json.loads(as_json(run)), Page(plan_page(run))
    parameters, time = plan["parameters"], plan["time"]
    tokens = sum(stage["steps"] * stage["tokens_per_step"] for stage in plan["stages"])  # neither stops early
    expected = [parameters["total"], parameters["active"], parameters["mtp"], tokens, plan["memory_gib"]["total"]]
    expected += [time[name] for name in ("step_seconds", "tokens_per_second_per_gpu", "mfu", "days", "gpu_hours")]
    assert [float(value) for value in page.values] == [value for value in expected if value]
    assert f"{parameters['total']:,}" in page.texts
    for row in plan["communication_bytes"]:
        assert row["what"] in page.texts
    for origin in plan["origins"]:
        assert {origin["key"], origin["value"]} <= set(page.texts)


def test_strip_is_cut_where_the_pipeline_is() -> None:
    layout = ("parallel.tp=2", "parallel.pp=4", "parallel.vpp=2", "parallel.ep=8")
    run = planned("recipe=super_nvfp4", "world_size=256", *layout)
    page = Page(plan_page(run))
    main_stack, *depths = run.layout.hybrid_layer_pattern.split("/")
    kinds = {"M": "mamba", "*": "attention", "E": "moe"}
    chunks = [*main_stack.split("|"), *depths]
    assert len(chunks) == 8 + run.model.mtp_depths
    assert page.cells == [[kinds[symbol] for symbol in chunk] for chunk in chunks]
    first = len(chunks[0])
    assert f"pipeline rank 1, chunk 0: layers {first} to {first + len(chunks[1]) - 1}" in page.texts


def test_names_are_text_and_never_markup() -> None:
    run = planned("recipe=tiny")
    name = "<script>alert(1)</script> & [bold]x[/bold]"
    origin = replace(run.origins[0], value="<b>value</b>")
    page = Page(plan_page(replace(run, name=name, origins=(origin,))))
    assert "script" not in page.tags
    assert "b" not in page.tags
    assert f"{name}: plan" in page.texts
    assert "<b>value</b>" in page.texts


def test_command_writes_the_page_and_leaves_json_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "--json", "recipe=tiny", "--html", "pages/plan.html"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["recipe"] == "tiny"
    assert "page: pages/plan.html" in captured.err
    assert "tiny: plan" in Page((tmp_path / "pages/plan.html").read_text()).texts


def test_page_that_cannot_be_written_is_the_users_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "recipe=tiny", "--html", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_search_has_no_page(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["plan", "recipe=tiny", "--search", "--html", "plan.html"])
    assert stopped.value.code == 2
    assert "not allowed with" in capsys.readouterr().err
