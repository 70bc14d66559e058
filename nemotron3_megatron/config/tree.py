"""Hydra: the tree of YAML files and the command line, composed to plain data and the list of its writers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.default_element import ResultDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, QuotedString
from hydra.errors import HydraException, MissingConfigException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemotron3_megatron.config.defaults import check_defaults
from nemotron3_megatron.config.errors import COMMAND_LINE, UserError
from nemotron3_megatron.config.provenance import Write, enclosing, file_writes
from nemotron3_megatron.config.typed import nearest_name

_ROOT = "config"
_RECIPE = "recipe"


@dataclass(frozen=True, slots=True)
class Composed:
    """Plain data of the whole recipe, and everybody who wrote to it, lowest precedence first."""

    data: dict[Any, object]
    writes: tuple[Write, ...]
    recipe_name: str


def load(overrides: Sequence[str], recipes: Path) -> Composed:
    """Compose ``recipes/config.yaml`` with the command line ``key=value`` overrides.

    Raises:
        UserError: an override that cannot be parsed, an unknown group choice, a broken file.
    """
    parsed = _parse(overrides)
    with initialize_config_dir(config_dir=str(recipes), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        choices = _group_choices(parsed, loader, recipes)
        lines = [_override_line(override, is_choice=override.key_or_group in choices) for override in parsed]
        writes: list[Write] = []
        try:
            used = loader.compute_defaults_list(_ROOT, lines, RunMode.RUN).defaults
            writes = [*_file_writes(used, recipes), *_command_line_writes(parsed, choices)]
            config = hydra_compose(_ROOT, lines)
            data = OmegaConf.to_container(config, resolve=True)
            _check_effect(parsed, config)
        except (HydraException, OmegaConfBaseException, yaml.YAMLError, OSError, ValueError) as error:
            _check_files(recipes, choices[_RECIPE])
            raise _not_composed(error, writes) from None
    assert isinstance(data, dict)
    return Composed(data, tuple(writes), choices[_RECIPE])


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """Every combination of the comma-separated values, in Hydra's order: ``a=1,2 b=3`` is ``[a=1, b=3], [a=2, b=3]``.

    Raises:
        UserError: an override that cannot be parsed, or one that names no finite list of values.
    """
    try:
        choices = [list(_sweep_values(override)) for override in _parse(overrides, sweep=True)]
    except HydraException as error:
        raise UserError("the sweep", where=COMMAND_LINE, why=_first_line(error)) from None
    return [list(job) for job in product(*choices)]


def _sweep_values(override: Override) -> Iterator[str]:
    if not override.is_sweep_override():
        assert override.input_line is not None
        yield override.input_line
        return
    for value in override.sweep_string_iterator():
        yield f"{override.get_key_element()}={value}"


def _parse(overrides: Sequence[str], *, sweep: bool = False) -> list[Override]:
    parser = OverridesParser.create()
    parsed = []
    for text in map(_with_quoted_fault, overrides):
        try:
            override = parser.parse_override(text)
        except HydraException:
            why = "is not of the form key=value" if "=" not in text else "has a value that cannot be read"
            key, _, value = text.partition("=")
            nearest = f"{key}='\"{value}\"'" if value else f"{text.strip('-') or 'key'}=value"
            raise UserError(text, where=COMMAND_LINE, why=why, nearest=nearest) from None
        if override.key_or_group.split(".")[0].split("/")[0] in ("", "hydra"):
            why = "sets nothing that a recipe has"
            raise UserError(text, where=COMMAND_LINE, why=why, nearest="a key of python train.py --help")
        if override.is_sweep_override() and not sweep:
            raise UserError(
                text,
                where=COMMAND_LINE,
                why="names several values, which only a sweep takes",
                nearest=f"python train.py -m {text}, or quote a value that contains a comma",
            )
        parsed.append(override)
    return parsed


def _check_effect(parsed: Sequence[Override], config: DictConfig) -> None:
    """``key={}`` merges nothing into what the recipe has there."""
    for override in parsed:
        if override.value() == {} and OmegaConf.select(config, key := override.key_or_group):
            why = "mappings are merged, so an empty one changes nothing"
            raise UserError(f"{key}={{}}", where=COMMAND_LINE, why=why, nearest=f"~{key}")


def _with_quoted_fault(text: str) -> str:
    """``debug.fault=kill:rank=1,step=20`` is one value, which Hydra's grammar would need quotes for."""
    key, _, value = text.partition("=")
    return f"{key}='{value}'" if key.lstrip("+") == "debug.fault" and not {"'", '"'} & set(value) else text


def _group_choices(parsed: Sequence[Override], loader: ConfigLoader, recipes: Path) -> dict[str, str]:
    """The ``group=choice`` overrides, checked against the files that exist."""
    choices: dict[str, str] = {}
    for override in parsed:
        group = override.key_or_group
        options = loader.get_group_options(group, results_filter=ObjectType.CONFIG)
        if not options or override.is_delete():
            continue
        choice = "null" if (chosen := override.value()) is None else chosen
        if group in choices:
            raise UserError(
                group,
                where=COMMAND_LINE,
                why=f"is chosen twice: {choices[group]} and {choice}",
                nearest=f"{group}={choice}",
            )
        if not isinstance(choice, str) or choice not in options:
            close = nearest_name(str(choice), options) or ""
            raise UserError(
                f"{group}={choice}",
                where=COMMAND_LINE,
                why=f"there is no {recipes.name}/{group}/{choice}.yaml; there are {', '.join(options)}",
                nearest=f"{group}={close}" if close else None,
            )
        choices[group] = choice
    if _RECIPE not in choices:
        options = loader.get_group_options(_RECIPE, results_filter=ObjectType.CONFIG)
        raise UserError("recipe", why="no recipe is chosen", nearest=f"recipe=NAME, NAME one of {', '.join(options)}")
    return choices


def _override_line(override: Override, *, is_choice: bool) -> str:
    """Defaults live in dataclasses, so a value may be set that no file mentions: Hydra's ``++``."""
    assert override.input_line is not None
    if is_choice or override.is_delete():
        return override.input_line
    return "++" + override.input_line.lstrip("+")


def _file_writes(used: Sequence[ResultDefault], recipes: Path) -> Iterator[Write]:
    parents = {default.config_path: default.parent for default in used if default.config_path}
    seen: list[str] = []
    for default in used:
        source = default.config_path
        if source is None or not (path := recipes / f"{source}.yaml").is_file():
            continue
        below = {other for other in seen if source in _ancestors(other, parents)}
        overrides = frozenset(seen if source.startswith(f"{_RECIPE}/") else below)
        yield from file_writes(path, recipes.parent, source, default.package or "", overrides)
        seen.append(source)


def _ancestors(source: str, parents: Mapping[str, str | None]) -> Iterator[str]:
    parent = parents.get(source)
    while parent is not None and parent != _ROOT:
        yield parent
        parent = parents.get(parent)


def _command_line_writes(parsed: Sequence[Override], choices: Mapping[str, str]) -> Iterator[Write]:
    for override in parsed:
        if override.is_delete() or override.key_or_group in choices:
            continue
        for key in _flat_keys(override.key_or_group, override.value()):
            yield Write(key, COMMAND_LINE, COMMAND_LINE)


def _flat_keys(key: str, value: object) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            text = name.text if isinstance(name, QuotedString) else name
            yield from _flat_keys(f"{key}.{text}", inner)
    else:
        yield key


def _check_files(recipes: Path, recipe: str) -> None:
    """Find the broken file behind an error of Hydra's, which seldom names the line."""
    for path in sorted(recipes.rglob("*.yaml")):
        file_writes(path, recipes.parent, path.stem, "", frozenset())
    check_defaults(recipes / _RECIPE / f"{recipe}.yaml", recipes)


def _not_composed(error: Exception, writes: Sequence[Write]) -> UserError:
    if isinstance(error, MissingConfigException):
        return _missing_file(error)
    _, found, override = str(error).splitlines()[0].partition("Error merging override ++")
    if found:
        why = f"does not fit what the recipe sets there: {_first_line(error.__cause__ or error)}"
        return UserError(override, where=COMMAND_LINE, why=why)
    if missing := re.match(r"Could not delete from config\. '(.+)' does not exist", str(error)):
        keys = {name for write in writes for name in enclosing(write.key)}
        close = nearest_name(missing[1], keys)
        return UserError(
            f"~{missing[1]}",
            where=COMMAND_LINE,
            why="removes what the recipe does not have",
            nearest=f"~{close}" if close else None,
        )
    return UserError("the recipe does not compose", why=_first_line(error))


def _missing_file(error: MissingConfigException) -> UserError:
    options = list(error.options or [])
    wanted = error.missing_cfg_file or ""
    close = nearest_name(wanted.rsplit("/", 1)[-1], options)
    return UserError(_first_line(error), why=f"there are {', '.join(options)}" if options else "", nearest=close)


def _first_line(error: BaseException) -> str:
    return " ".join(line.strip() for line in str(error).splitlines()[:2] if line.strip())
