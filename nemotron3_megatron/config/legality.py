"""Everything that can be known to be impossible before anything starts.

Each rule is a pure function from a recipe and a world size to the violations it sees; those of the precision plan,
which needs a legal model, come second. The nearest legal value in a message is found by trying: the value closest to
the one set for which no rule objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from nemotron3_megatron.config.errors import COMMAND_LINE, UserError
from nemotron3_megatron.config.parts import Part, is_uniform, parts
from nemotron3_megatron.config.provenance import enclosing
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import Rule
from nemotron3_megatron.config.run import Origin
from nemotron3_megatron.config.stage_rules import CURRICULUM_RULES, LAYOUT_RULES, RULES, SCHEDULE_RULES
from nemotron3_megatron.config.typed import show

_TRIES = 2048
_TRIES_AFTER_QUIET = 64
_WORLD = "world_size"


@dataclass(frozen=True, slots=True)
class _Found:
    keys: tuple[str, ...]
    why: str
    hint: str | None
    rule: Rule


def check(recipe: Recipe, world_size: int, origins: Sequence[Origin] = (), step: int = 0) -> None:
    """Refuse a recipe that cannot run on ``world_size`` ranks from ``step`` on.

    Raises:
        UserError: naming the value, its place, the reason and the nearest legal values.
    """
    from nemotron3_megatron.config.precision import precision_rules
    from nemotron3_megatron.config.resilience import RESILIENCE_RULES
    from nemotron3_megatron.precision.parse import check_policy
    from nemotron3_megatron.precision.plan import precision_plan  # these import this package

    places = {origin.key: origin.place for origin in origins}

    def place(key: str) -> str | None:
        return next((places[name] for name in enclosing(key) if name in places), None)

    alone = is_uniform(recipe)
    if not alone:
        _check(Part(recipe, world_size), places, CURRICULUM_RULES)
    for each in parts(recipe, world_size, step):
        _check(each, places, (*RULES, *RESILIENCE_RULES) if alone else LAYOUT_RULES)
        precision, key = each.recipe.precision, each.name("precision")
        check_policy(precision, key, place)  # again: a recipe may have been changed since it was composed
        plan = precision_plan(precision, each.recipe.model, key, place)
        _check(each, places, (*(RULES if alone else LAYOUT_RULES), *precision_rules(plan)))
    if not alone:
        _check(Part(recipe, world_size), places, (*SCHEDULE_RULES, *RESILIENCE_RULES))


def _check(whole: Part, places: Mapping[str, str], rules: Sequence[Rule]) -> None:
    recipe, world_size = whole.recipe, whole.world_size
    found = _first(recipe, world_size, rules)
    if found is None:
        return
    keys = sorted(found.keys, key=lambda key: _blame(places.get(whole.name(key))))
    nearest = [whole.name(text) for key in keys if (text := _nearest(recipe, world_size, key, found, rules))]
    value = world_size if keys[0] == _WORLD else value_of(recipe, keys[0])
    default_place = "torchrun" if keys[0] == _WORLD else "default"
    name = whole.name(keys[0])
    wanted = f"; stage {next(iter(recipe.stages))} wants world_size={recipe.world_size}" if _wants(whole) else ""
    raise UserError(
        f"{name}={show(value)}",
        where=places.get(name, default_place),
        why=found.why + wanted,
        nearest=" or ".join(nearest) or found.hint,
    )


def _wants(whole: Part) -> bool:
    """Whether a stage with a layout of its own is in another world than its recipe says."""
    return bool(whole.renamed) and whole.recipe.world_size not in (None, whole.world_size)


def value_of(recipe: Recipe, key: str) -> Any:
    """The value of a dotted key, such as ``stages.main.seq_length``."""
    value: Any = recipe
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def with_value(recipe: Recipe, key: str, value: object) -> Recipe:
    """A copy of the recipe with one dotted key replaced."""
    replaced: Recipe = _replace(recipe, key.split("."), value)
    return replaced


def _replace(node: Any, names: Sequence[str], value: object) -> Any:
    name, *rest = names
    if isinstance(node, dict):
        return {**node, name: _replace(node[name], rest, value) if rest else value}
    assert is_dataclass(node)
    assert not isinstance(node, type)
    return replace(node, **{name: _replace(getattr(node, name), rest, value) if rest else value})


def _first(recipe: Recipe, world_size: int, rules: Sequence[Rule]) -> _Found | None:
    for rule in rules:
        for violation in rule(recipe, world_size):
            return _Found(violation.keys, violation.why, violation.hint, rule)
    return None


def _blame(place: str | None) -> int:
    return 2 if place is None else int(place != COMMAND_LINE)


def _nearest(recipe: Recipe, world_size: int, key: str, found: _Found, rules: Sequence[Rule]) -> str | None:
    """The legal value of ``key`` closest to the one set, all others unchanged; None when there is none near."""
    current = world_size if key == _WORLD else value_of(recipe, key)
    if isinstance(current, bool) or not isinstance(current, int):
        return None
    quiet: int | None = None  # silences this rule at least, though a later one objects
    for tried, candidate in enumerate(_outward(current)):
        changed, world = (recipe, candidate) if key == _WORLD else (with_value(recipe, key, candidate), world_size)
        objection = _first(changed, world, rules)
        if objection is None:
            return f"{key}={candidate}"
        if quiet is None and key != _WORLD and rules.index(objection.rule) > rules.index(found.rule):
            quiet = candidate
        if quiet is not None and tried > 8 * abs(quiet - current) + _TRIES_AFTER_QUIET:
            break
    return None if quiet is None else f"{key}={quiet}"


def _outward(value: int) -> Iterator[int]:
    if abs(value) > 10**12:
        return
    for distance in range(1, _TRIES):
        if value > distance:
            yield value - distance
        yield value + distance
