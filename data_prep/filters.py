"""Filters: which documents are kept, as datatrove steps that count what they drop by reason."""

from __future__ import annotations

import hashlib
import importlib
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters import GopherQualityFilter, GopherRepetitionFilter
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.utils.word_tokenizers import WordTokenizer

from data_prep.recipe import FilterConfig
from nemotron3_megatron.config.errors import UserError

_WORD = re.compile(r"\w+|[^\w\s]+")


class Words(WordTokenizer):  # type: ignore[misc]  # datatrove is not typed
    """Runs of word characters, and runs of other visible characters, in any language: no model, no download."""

    def word_tokenize(self, text: str) -> list[str]:
        """The words of a text."""
        return _WORD.findall(text)

    def sent_tokenize(self, text: str) -> list[str]:
        """Lines stand for sentences."""
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        """Start and end of each word."""
        return [match.span() for match in _WORD.finditer(text)]


class Length(BaseFilter):  # type: ignore[misc]
    """Keeps documents of a number of characters."""

    name = "length"

    def __init__(self, least: int, most: int | None) -> None:
        super().__init__()
        self.least = least
        self.most = most

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True to keep it, else the reason."""
        if len(doc.text) < self.least:
            return False, "too short"
        if self.most is not None and len(doc.text) > self.most:
            return False, "too long"
        return True


class Hook(BaseFilter):  # type: ignore[misc]
    """A user's own filter, imported where it runs."""

    def __init__(self, entry: str) -> None:
        self.name = entry
        super().__init__()
        self.entry = entry
        self._function: Callable[[Document], bool | tuple[bool, str]] | None = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """True to keep it, else the reason, by default the hook's name."""
        if self._function is None:
            self._function = load_hook(self.entry)
        kept = self._function(doc)
        return kept if isinstance(kept, tuple) else (kept, self.entry)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_function": None}  # the function may hold a model


def load_hook(entry: str) -> Callable[[Document], bool | tuple[bool, str]]:
    """The function MODULE:FUNCTION.

    Raises:
        UserError: there is none.
    """
    module, _, name = entry.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"filters.hooks: {entry}", why=str(error), nearest="MODULE:FUNCTION on PYTHONPATH") from error
    if not callable(function):
        raise UserError(f"filters.hooks: {entry}", why=f"it is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def filter_state(config: FilterConfig) -> dict[str, Any]:
    """Changes with everything that decides what is kept: for hooks, the files of their modules."""
    state = asdict(config)
    for entry in config.hooks:
        load_hook(entry)
    modules = sorted({entry.partition(":")[0] for entry in config.hooks})
    paths = [getattr(sys.modules[module], "__file__", None) for module in modules]
    if hashes := [hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths if path]:
        state["modules"] = hashes
    return state


def filters(config: FilterConfig) -> list[PipelineStep]:
    """The filters of a recipe, the cheap ones first.

    Raises:
        UserError: a hook does not exist.
    """
    steps: list[PipelineStep] = []
    if config.min_characters or config.max_characters is not None:
        steps.append(Length(config.min_characters, config.max_characters))
    if config.quality != "none":
        english = {} if config.quality == "english" else {"min_stop_words": None}
        words = Words()  # one for both: datatrove keeps the words of the last documents
        steps.append(GopherQualityFilter(language=words, **english))
        steps.append(GopherRepetitionFilter(language=words))
    for entry in config.hooks:
        load_hook(entry)
        steps.append(Hook(entry))
    return steps


def dropped(step: PipelineStep) -> dict[str, int]:
    """Documents that a step dropped so far, by reason; a step without reasons is named itself."""
    counts = {label: int(value.total) for label, value in step.stats.stats.items()}
    reasons = {label.removeprefix("dropped_"): n for label, n in counts.items() if label.startswith("dropped_")}
    if not reasons and counts.get("dropped"):
        return {step.name: counts["dropped"]}
    return reasons
