from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nemotron3_megatron.config.compose import RECIPES, compose
from nemotron3_megatron.config.recipe import Recipe


@pytest.fixture(scope="session")
def tiny() -> Recipe:
    return compose(["recipe=tiny"])[0]


@pytest.fixture
def write_recipe(tmp_path: Path) -> Callable[[str, str], Path]:
    """Copy the real tree and write one file into it; returns the tree."""
    tree = tmp_path / "recipes"
    shutil.copytree(RECIPES, tree)

    def write(name: str, text: str) -> Path:
        (tree / name).write_text(text, encoding="utf-8")
        return tree

    return write
