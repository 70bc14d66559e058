"""Megatron-Core's indexed datasets, imported only where tokens are written: it takes seconds and warns of much."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import nemotron3_megatron  # noqa: F401  adapts Megatron-Core to this machine before it is imported


def indexed_dataset() -> Any:
    """The module ``megatron.core.datasets.indexed_dataset``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("megatron.core.datasets.indexed_dataset")
    # Megatron-Core asks for a rank before it logs; there is none here.
    warnings.filterwarnings("ignore", message="Could not determine rank")
    return module
