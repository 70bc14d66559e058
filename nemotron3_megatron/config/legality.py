"""Everything that can be known to be impossible before anything starts.

Each rule is a pure function from a recipe and a world size to the violations it sees; those of the precision plan,
which needs a legal model, come second. The nearest legal value in a message is found by trying: the value closest to
the one set for which no rule objects.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.provenance import COMMAND_LINE, enclosing
from nemotron3_megatron.config.recipe import Recipe
from nemotron3_megatron.config.rules import RULES, Rule
from nemotron3_megatron.config.run import Origin
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


def check(recipe: Recipe, world_size: int, origins: Sequence[Origin] = ()) -> None:
    """Refuse a recipe that cannot run on ``world_size`` ranks.

    Raises:
        UserError: naming the value, its place, the reason and the nearest legal values.
    """
    from nemotron3_megatron.config.precision import precision_rules
    from nemotron3_megatron.precision.parse import check_policy
    from nemotron3_megatron.precision.plan import precision_plan  # these three import this package

    places = {origin.key: origin.place for origin in origins}

    def place(key: str) -> str | None:
        return next((places[name] for name in enclosing(key) if name in places), None)

    _check(recipe, world_size, places, RULES)
    check_policy(recipe.precision, "precision", place)  # again: a recipe may have been changed since it was composed
    plan = precision_plan(recipe.precision, recipe.model, "precision", place)
    _check(recipe, world_size, places, (*RULES, *precision_rules(plan)))


def _check(recipe: Recipe, world_size: int, places: Mapping[str, str], rules: Sequence[Rule]) -> None:
    found = _first(recipe, world_size, rules)
    if found is None:
        return
    keys = sorted(found.keys, key=lambda key: _blame(places.get(key)))
    nearest = [text for key in keys if (text := _nearest(recipe, world_size, key, found, rules))]
    value = world_size if keys[0] == _WORLD else value_of(recipe, keys[0])
    default_place = "torchrun" if keys[0] == _WORLD else "default"
    raise UserError(
        f"{keys[0]}={show(value)}",
        where=places.get(keys[0], default_place),
        why=found.why,
        nearest=" or ".join(nearest) or found.hint,
    )


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
