"""Checkpoints of small models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # ``saved_models``, shared by the tests here

from saved_models import EVERY_KIND, Save, Saved, save_model


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Save:
    """``save(*overrides, recipe="tiny")``."""
    return lambda *overrides, **options: save_model(tmp_path_factory.mktemp("run"), *overrides, **options)


@pytest.fixture(scope="session")
def every_kind(save: Save) -> Saved:
    """BF16, LatentMoE, two depths of one MTP block."""
    return save(*EVERY_KIND, "precision=bf16")
