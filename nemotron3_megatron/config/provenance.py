"""Who wrote each value: the file and line, or the command line; and whether two of them wrote the same one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.errors import COMMAND_LINE, UserError
from nemotron3_megatron.config.run import Origin
from nemotron3_megatron.config.typed import show


@dataclass(frozen=True, slots=True)
class Write:
    """One value set at one place."""

    key: str
    place: str
    source: str
    """Config path of the file, such as ``recipe/tiny``, or ``command line``."""
    overrides: frozenset[str] = frozenset()
    """Files that this one is meant to override."""
    inside: Mapping[str, str] = field(default_factory=dict)
    """Places of what the value holds, when it is a list: of ``precision.rules[3]``, ``precision.rules[3].role``."""

    def may_override(self, other: Write) -> bool:
        """True when this write is allowed to replace ``other``'s value."""
        return other.source in self.overrides or (self.source == COMMAND_LINE != other.source)


def file_writes(path: Path, root: Path, source: str, package: str, overrides: frozenset[str]) -> list[Write]:
    """The values that a YAML file sets, with their lines.

    Args:
        path: the file.
        root: directory that places are shown relative to.
        source: config path of the file inside the tree.
        package: dotted prefix that Hydra gives its keys; empty for ``_global_``.
        overrides: sources whose values the file may override.

    Raises:
        UserError: the file is not readable YAML, is not a mapping, or sets a key twice.
    """
    shown = _shown(path, root)
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UserError(shown + line, why=f"is not YAML: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(shown, why=f"cannot be read: {error}") from None
    if node is None:
        return []
    if not isinstance(node, yaml.MappingNode):
        raise UserError(shown, why="must be a mapping of keys to values", nearest="key: value")
    prefix = f"{package}." if package else ""
    return [
        Write(prefix + key, f"{shown}:{line}", source, overrides, dict(_inside(value, prefix + key, shown)))
        for key, line, value in _leaves(node, "", shown)
        if key.split(".")[0] != "defaults"
    ]


def check_single_writers(writes: Iterable[Write]) -> dict[str, Write]:
    """The last writer of each key.

    Raises:
        UserError: a key has two writers, and the second is not meant to override the first.
    """
    last: dict[str, Write] = {}
    for write in writes:
        previous = last.get(write.key)
        if previous is not None and not write.may_override(previous):
            both = write.place if previous.place == write.place else f"{previous.place} and {write.place}"
            raise UserError(
                write.key,
                where=both,
                why="is set twice",
                nearest="keep one of the two; only the recipe file and the command line may override",
            )
        last[write.key] = write
    return last


def origins(recipe: object, writers: Mapping[str, Write]) -> tuple[Origin, ...]:
    """Where every explicitly set value of a recipe comes from, in the order of the recipe's fields."""
    found = []
    for key, value, default in _values(recipe, ""):
        place = place_of(key, writers) if key in writers or key.partition("[")[0] in writers else None
        if place is not None:
            found.append(Origin(key=key, value=show(value), default=default, place=place))
    return tuple(found)


def place_of(key: str, writers: Mapping[str, Write]) -> str | None:
    """Where a key was written: it, something in it, or else the value that it is a part of."""
    dotted = re.sub(r"\[(\d+)\]", r".\1", key)  # so the command line writes into a list: precision.rules.0.format=...
    inside = (write for name, write in writers.items() if name.startswith(f"{dotted}."))
    write = writers.get(dotted) or next(inside, None)
    if write is not None:
        return write.place
    write = next((writers[name] for name in enclosing(key) if name in writers), None)
    if write is None:
        return None
    return next((write.inside[name] for name in enclosing(key) if name in write.inside), write.place)


def enclosing(key: str) -> Iterator[str]:
    """A key and all that hold it, outwards: ``a.b[2].c``, ``a.b[2]``, ``a.b``, ``a``."""
    while key:
        yield key
        key = key[: max(key.rfind("."), key.rfind("["), 0)]


def _shown(path: Path, root: Path) -> str:
    return str(path.relative_to(root)) if path.is_relative_to(root) else str(path)


def _leaves(node: yaml.Node, key: str, shown: str) -> Iterator[tuple[str, int, yaml.Node]]:
    """Key, line and value of all that is no mapping, or an empty one."""
    if not isinstance(node, yaml.MappingNode):
        yield key, node.start_mark.line + 1, node
        return
    seen: dict[str, int] = {}
    for name, child in node.value:
        full = f"{key}.{name.value}" if key else str(name.value)
        line = name.start_mark.line + 1
        if full in seen:
            raise UserError(
                full,
                where=f"{shown}:{seen[full]} and {shown}:{line}",
                why="is set twice",
                nearest="keep one of the two",
            )
        seen[full] = line
        if isinstance(child, yaml.MappingNode) and child.value:
            yield from _leaves(child, full, shown)
        else:
            yield full, line, child


def _inside(node: yaml.Node, key: str, shown: str) -> Iterator[tuple[str, str]]:
    """Key and place of every entry of a list, and of the values of an entry."""
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield f"{key}[{index}]", f"{shown}:{item.start_mark.line + 1}"
            yield from _inside(item, f"{key}[{index}]", shown)
    elif isinstance(node, yaml.MappingNode):
        for name, item in node.value:
            full = f"{key}.{name.value}"
            yield full, f"{shown}:{name.start_mark.line + 1}"
            yield from _inside(item, full, shown)


def _values(value: Any, key: str) -> Iterator[tuple[str, object, str]]:
    """(dotted key, value, default as text) of every leaf below a dataclass; entries of a list of them are leaves."""
    for item in fields(value):
        full, current = f"{key}.{item.name}" if key else item.name, getattr(value, item.name)
        if is_dataclass(current) and not isinstance(current, Duration):
            yield from _values(current, full)
        elif isinstance(current, dict):
            yield from _entries(current, full)
        else:
            default = "required" if item.default is MISSING else show(item.default)
            if isinstance(current, tuple) and current and is_dataclass(current[0]):
                yield from ((f"{full}[{index}]", inner, default) for index, inner in enumerate(current))
            else:
                yield full, current, default


def _entries(mapping: Mapping[str, Any], key: str) -> Iterator[tuple[str, object, str]]:
    """As ``_values``, of what is named by the user."""
    for name, inner in mapping.items():
        full = f"{key}.{name}"
        if isinstance(inner, Mapping):
            yield from _entries(inner, full)
        elif is_dataclass(inner):
            yield from _values(inner, full)
        else:
            yield full, inner, "required"
