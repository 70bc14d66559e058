"""What docs/recipes.md says of recipes and layouts is what the recipes say."""

from __future__ import annotations

import re
import shlex
from itertools import cycle
from pathlib import Path

import pytest

from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.compose import RECIPES
from nemotron3_megatron.plan.counts import count_parameters

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^    nemotron3 plan (.*)$", PAGE, re.MULTILINE)
MILLIONS = {"M": 1, "B": 1_000, "T": 1_000_000}


def rows(heading: str) -> list[list[str]]:
    """Cells of the first table under a heading, without its two head rows."""
    section = PAGE.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def names(cell: str) -> list[str]:
    return re.findall(r"`(\w+)`", cell)


def numbers(cell: str) -> list[int]:
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", cell)]


@pytest.mark.parametrize("row", rows("What there is"), ids=lambda row: names(row[0])[0])
def test_table_of_recipes(row: list[str]) -> None:
    total, active, mtp = (numbers(cell) for cell in row[1:4])
    for place, name in enumerate(names(row[0])):
        recipe, _ = compose([f"recipe={name}"])
        counts = count_parameters(recipe.model)
        assert counts.total == (total[place] if len(total) > 1 else total[0])
        assert counts.active == (active[place] if len(active) > 1 else active[0])
        assert counts.mtp == (mtp[0] if mtp else 0)
        assert recipe.world_size == numbers(row[6])[0]
        if row[4] != "as Nano":
            for stage, tokens in zip(recipe.stages.values(), row[4].split(" + "), strict=True):
                # Written to two or three digits; the ladder's sequences are known to four.
                millions = float(tokens[:-1]) * MILLIONS[tokens[-1]]
                assert stage.tokens.value / 1e6 == pytest.approx(millions, rel=3e-3)


def test_every_recipe_and_layout_is_in_its_table() -> None:
    documented = {name for row in rows("What there is") for name in names(row[0])}
    assert documented == {path.stem for path in (RECIPES / "recipe").glob("*.yaml")}
    layouts = {name for row in rows("Layouts") for name in names(row[0])}
    elementary = {"single", "ep2"}
    assert layouts == {path.stem for path in (RECIPES / "parallel").glob("*.yaml")} - elementary


@pytest.mark.parametrize("row", rows("Layouts"), ids=lambda row: names(row[0])[0])
def test_table_of_layouts(row: list[str]) -> None:
    parts = [
        {kind.lower(): int(size) for kind, size in re.findall(r"(TP|CP|EP|PP)(\d+)", layout)}
        for layout in row[2].split(", ")
    ]
    written = [part for part in parts if part]
    for name, sizes in zip(names(row[0]), cycle(written), strict=False):
        parallel = compose(["recipe=nano_bf16", f"parallel={name}"])[0].parallel
        found = {"tp": parallel.tp, "cp": parallel.cp, "ep": parallel.ep, "pp": parallel.pp}
        assert found == {"tp": 1, "cp": 1, "ep": 1, "pp": 1} | sizes
        assert parallel.etp == 1
        assert parallel.distributed_optimizer
        assert parallel.overlap_grad_reduce
        assert parallel.overlap_param_gather
        recomputed = "MoE recomputed" in row[2] and not name.startswith("b200")
        assert parallel.recompute_modules == (("moe",) if recomputed else ())


def test_there_are_commands() -> None:
    assert len(COMMANDS) == 11


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_resolve(command: str) -> None:
    recipe, origins = compose(shlex.split(command))
    assert recipe.world_size is not None
    resolve(recipe, recipe.world_size, origins)
