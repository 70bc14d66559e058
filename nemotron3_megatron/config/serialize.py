"""A run as JSON and back, without loss."""

from __future__ import annotations

import json
from dataclasses import fields, is_dataclass
from pathlib import Path

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.typed import typed


def to_json(run: Run) -> str:
    """The whole run; durations and paths as text."""
    return json.dumps(plain(run), indent=2, allow_nan=False)


def from_json(text: str) -> Run:
    """The run that ``to_json`` wrote.

    Raises:
        UserError: the text is no JSON, or is not a run of this version.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError("run.json", where=f"line {error.lineno}", why=f"is not JSON: {error.msg}") from None
    run = typed(Run, data, "", lambda key: "run.json")
    assert isinstance(run, Run)
    return run


def plain(value: object) -> object:
    """Dataclasses as dictionaries, durations and paths as text, tuples as lists."""
    if isinstance(value, Duration | Path):
        return str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item) for item in value]
    return value
