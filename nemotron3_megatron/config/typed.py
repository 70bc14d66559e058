"""Plain values to frozen dataclasses, strictly: nothing is converted that the recipe did not say."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import COMMAND_LINE, UserError

Place = Callable[[str], str | None]
"""Where the value of a dotted key was written, such as ``recipes/recipe/tiny.yaml:12``."""

UNSET = "???"
"""OmegaConf's mark for a value that somebody else must set."""


def typed(kind: Any, value: object, key: str, place: Place) -> Any:
    """Build a value of the annotated type ``kind`` from YAML or JSON data.

    Args:
        kind: a dataclass, ``X | None``, ``Literal``, ``dict[str, X]``, ``tuple[X, ...]``, ``Duration``, ``Path``,
            ``int``, ``float``, ``str`` or ``bool``.
        value: what was read; dataclasses are mappings, durations and paths are strings.
        key: dotted name used in messages.
        place: where a key was written.

    Raises:
        UserError: unknown or missing key, or a value of another type.
    """
    if isinstance(value, str) and value == UNSET:
        raise _missing(key, kind, place)
    if is_dataclass(kind) and kind is not Duration:
        return _record(kind, value, key, place)
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        (inner,) = (option for option in get_args(kind) if option is not NoneType)
        return None if value is None else typed(inner, value, key, place)
    if origin is Literal:
        return _choice(get_args(kind), value, key, place)
    if origin is dict:
        items, inner = _mapping(value, key, place), get_args(kind)[1]
        _check_complete(inner, items, key, place)
        return {name: typed(inner, item, _join(key, name), place) for name, item in items.items()}
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(key, value, "a list", place, nearest=f"{key}=[{value}]")
        return tuple(typed(get_args(kind)[0], item, f"{key}[{i}]", place) for i, item in enumerate(value))
    if kind is Duration:
        return _duration(value, key, place)
    return _scalar(kind, value, key, place)


def describe(kind: Any) -> str:
    """A type as a user reads it: ``integer``, ``'auto' | 'cpu'``, ``duration or null``."""
    origin = get_origin(kind)
    if origin in (Union, UnionType):
        (inner,) = (option for option in get_args(kind) if option is not NoneType)
        return f"{describe(inner)} or null"
    if origin is Literal:
        return " | ".join(map(str, get_args(kind)))
    if origin is dict:
        return "mapping"
    if origin is tuple:
        return f"list of {describe(get_args(kind)[0])}"
    names: dict[Any, str] = {int: "integer", float: "number", str: "text", bool: "true | false"}
    names |= {Duration: "duration", Path: "path"}
    return names.get(kind, "mapping")


def show(value: object) -> str:
    """A value as it is written in a recipe; of a mapping, the keys that are not null, false or empty."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(show, value))}]"
    if is_dataclass(value) and not isinstance(value, type | Duration):
        value = {item.name: getattr(value, item.name) for item in fields(value)}
    if isinstance(value, Mapping):
        items = {name: item for name, item in value.items() if item is not None and item is not False and item != ""}
        return f"{{{', '.join(f'{show(name)}: {show(item)}' for name, item in items.items())}}}"
    return str(value) if not isinstance(value, str) or value else "''"


def nearest_name(name: str, legal: Iterable[str]) -> str | None:
    """The legal name closest in spelling, or None when nothing is close."""
    close = difflib.get_close_matches(name, list(legal), n=1, cutoff=0.5)
    return close[0] if close else None


def is_required(item: Field[Any]) -> bool:
    """True when a dataclass field has no default."""
    return item.default is MISSING and item.default_factory is MISSING


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _record(kind: Any, value: object, key: str, place: Place) -> Any:
    items = _mapping(value, key, place)
    hints = get_type_hints(kind)
    legal = {item.name: item for item in fields(kind)}
    for name in items:
        if name not in legal:
            raise _unknown(name, key, legal, place)
    for name, item in legal.items():
        if name not in items and is_required(item):
            raise _missing(_join(key, name), hints[name], place)
    return kind(**{name: typed(hints[name], item, _join(key, name), place) for name, item in items.items()})


def _check_complete(kind: Any, items: Mapping[str, object], key: str, place: Place) -> None:
    """Of records that the user names: one that lacks a required value, beside others, is likely a misspelt name."""
    required = [item.name for item in fields(kind) if is_required(item)] if is_dataclass(kind) else []
    for name, item in items.items():
        lacking = [field for field in required if isinstance(item, Mapping) and field not in item]
        others = [other for other in items if other != name]
        if lacking and others:
            full = _join(key, name)
            new = f"{full}.{lacking[0]}=<{describe(get_type_hints(kind)[lacking[0]])}>"
            raise UserError(
                full,
                where=place(full),
                why=f"there is no such entry beside {', '.join(others)}, and a new one needs {', '.join(lacking)}",
                nearest=f"{_join(key, nearest_name(name, others) or others[0])} or {new}",
            )


def _mapping(value: object, key: str, place: Place) -> Mapping[str, object]:
    if not isinstance(value, Mapping):
        raise _wrong(key, value, "a mapping of names to values", place)
    for name in value:
        if not isinstance(name, str):
            raise _wrong(_join(key, str(name)), name, "a text name", place, nearest=f"'{name}' in quotes")
    return value


def _unknown(name: str, key: str, legal: Iterable[str], place: Place) -> UserError:
    full = _join(key, name)
    if "." in name:
        nested = ": {".join(name.split("."))
        return UserError(
            full,
            where=place(full),
            why="dotted names do not work inside files",
            nearest=f"nested mappings, {nested}: ...{'}' * name.count('.')}",
        )
    close = nearest_name(name, legal)
    nearest = _join(key, close) if close else f"one of {', '.join(_join(key, option) for option in legal)}"
    return UserError(full, where=place(full), why="there is no such key", nearest=nearest)


def _missing(key: str, kind: Any, place: Place) -> UserError:
    return UserError(key, where=place(key), why="is required and has no value", nearest=f"{key}=<{describe(kind)}>")


def _wrong(key: str, value: object, expected: str, place: Place, nearest: str | None = None) -> UserError:
    what = f"{key or 'recipe'}={show(value)}"
    return UserError(what, where=place(key), why=f"must be {expected}, is {_type_name(value)}", nearest=nearest)


def _type_name(value: object) -> str:
    names = {bool: "true/false", int: "an integer", float: "a number", str: "text", list: "a list", NoneType: "null"}
    return names.get(type(value), "a mapping" if isinstance(value, Mapping) else type(value).__name__)


def _choice(options: tuple[Any, ...], value: object, key: str, place: Place) -> object:
    for option in options:
        if type(value) is type(option) and value == option:
            return option
    close = nearest_name(str(value), options)
    legal = " | ".join(options)
    raise UserError(
        f"{key}={show(value)}", where=place(key), why=f"must be one of {legal}", nearest=f"{key}={close or options[0]}"
    )


def _duration(value: object, key: str, place: Place) -> Duration:
    if isinstance(value, Duration):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise UserError(
            f"{key}={value}",
            where=place(key),
            why="a duration is written with its unit",
            nearest=f"{key}='{value:g} steps' or {key}='{value:g} tokens'",
        )
    if not isinstance(value, str):
        raise _wrong(key, value, "a duration", place, nearest=f"{key}='500 steps'")
    try:
        return Duration.parse(value)
    except ValueError as error:
        raise UserError(f"{key}={value}", where=place(key), why=str(error), nearest=f"{key}='500 steps'") from None


def _scalar(kind: Any, value: object, key: str, place: Place) -> object:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and is_number:
        return _finite(value, key, place)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if type(value) is kind:
        return value
    nearest = None
    if kind is int and isinstance(value, float) and math.isfinite(value):
        nearest = f"{key}={round(value)}"
    elif kind in (int, float) and isinstance(value, str) and (number := _number(kind, value)) is not None:
        nearest = f"{key}={number} (without quotes)"
    elif kind in (str, Path) and value is not None:
        quoted = f"'{show(value)}'" if place(key) != COMMAND_LINE else f"'\"{show(value)}\"'"  # a shell takes its own
        nearest = f"{key}={quoted} (quoted)"
    elif kind is bool:
        nearest = f"{key}=true or {key}=false"
    article = {int: "an integer", float: "a number", str: "text", bool: "true or false"}.get(kind, "a path")
    raise _wrong(key, value, article, place, nearest)


def _finite(value: Any, key: str, place: Place) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise UserError(f"{key}={value}", where=place(key), why="must be a finite number")
    return number


def _number(kind: Any, text: str) -> int | float | None:
    try:
        number: int | float = kind(text)
    except ValueError:
        return None
    return number
