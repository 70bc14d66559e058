"""The defaults list of a file: which choice of which group it names, and whether that exists."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import yaml

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import nearest_name


def check_defaults(path: Path, recipes: Path) -> None:
    """Find the entry of a defaults list that names a missing group or choice; Hydra's message has no line.

    Raises:
        UserError: naming the line of the entry.
    """
    groups = sorted(entry.name for entry in recipes.iterdir() if entry.is_dir())
    for group, choice, line in _choices(path):
        place = f"{path.relative_to(recipes.parent)}:{line}"
        if group not in groups:
            close = nearest_name(group, groups)
            raise UserError(f"/{group}: {choice}", where=place, why="there is no such group", nearest=f"/{close}")
        options = sorted(entry.stem for entry in (recipes / group).glob("*.yaml"))
        if choice not in options:
            close = nearest_name(choice, options) or f"one of {', '.join(options)}"
            why = f"there is no {recipes.name}/{group}/{choice}.yaml"
            raise UserError(f"/{group}: {choice}", where=place, why=why, nearest=close)


def _choices(path: Path) -> Iterator[tuple[str, str, int]]:
    """(group, choice, line) of each ``/group: choice`` or ``override /group: choice``."""
    root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    if not isinstance(root, yaml.MappingNode):
        return
    lists = [node for name, node in root.value if name.value == "defaults" and isinstance(node, yaml.SequenceNode)]
    for entry in (entry for node in lists for entry in node.value if isinstance(entry, yaml.MappingNode)):
        for name, choice in entry.value:
            group = str(name.value).removeprefix("override ").strip()
            if group.startswith("/") and isinstance(choice, yaml.ScalarNode):
                yield group.removeprefix("/").partition("@")[0], choice.value, name.start_mark.line + 1
