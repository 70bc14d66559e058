"""Which tokenizers made the sources of a run, where manifests of data_prep beside them tell."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path

from nemotron3_megatron.config.recipe import SourceConfig

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
"""As data_prep writes it, beside the tokens."""


def warn_of_tokenizers(sources: Mapping[str, SourceConfig]) -> None:
    """Say so where sources were made by different tokenizers: an id of one is another piece of text in the other.

    No refusal: a tokenizer's fingerprint may also change with the version of its library.
    """
    made: dict[str, list[str]] = {}
    for name, config in sources.items():
        if (fingerprint := _fingerprint(Path(config.path).parent / MANIFEST)) is not None:
            made.setdefault(fingerprint, []).append(name)
    if len(made) > 1:
        found = "; ".join(f"{', '.join(names)}: {fingerprint}" for fingerprint, names in made.items())
        logger.warning("sources were made by different tokenizers, by the fingerprints of their manifests: %s", found)


def _fingerprint(manifest: Path) -> str | None:
    """Of the tokenizer; None where there is no manifest, or another tool's."""
    try:
        return str(json.loads(manifest.read_text(encoding="utf-8"))["tokenizer"]["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
