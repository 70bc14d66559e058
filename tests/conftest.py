"""Settings for all tests; makes ``launch``, ``ports`` and the like importable by name everywhere."""

from __future__ import annotations

import sys
from pathlib import Path

from hypothesis import settings

import nemotron3_megatron  # noqa: F401  (before any test file imports megatron, whatever the order in the file)

sys.path.insert(0, str(Path(__file__).parent / "distributed"))

# Examples are timed by the test runner's limit: on a busy machine the time of a single one says nothing.
settings.register_profile("nemotron3", deadline=None)
settings.load_profile("nemotron3")
