"""The precision plan: a policy applied to a model, one row per module, whatever the layout."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.typed import Place, nearest_name
from nemotron3_megatron.precision.layers import IllegalLayersError, select
from nemotron3_megatron.precision.modules import LinearModule, linear_modules
from nemotron3_megatron.precision.operands import Gemms, gemms
from nemotron3_megatron.precision.parse import nowhere
from nemotron3_megatron.precision.policy import Block, Format, Policy, Role, Rule

DEFAULT_RULE = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRow:
    """What one module computes in, and why."""

    module: str
    """Megatron-Core's name with the global layer number."""
    layer: int | None
    """Global number in the decoder, from 0; None in MTP."""
    block: Block
    role: Role
    format: Format
    rule: str
    """Selectors of the rule that decided, or ``default``."""
    gemms: Gemms


@dataclass(frozen=True, slots=True, kw_only=True)
class FoldedRow:
    """Modules of one role, format and rule."""

    block: Block
    role: Role
    format: Format
    rule: str
    layers: tuple[int, ...]
    """Empty in MTP."""
    modules: int


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """All modules of the whole model, in the order of the forward pass."""

    rows: tuple[PlanRow, ...]

    def as_data(self) -> list[dict[str, object]]:
        """One flat record a row: module, layer, block, role, format, rule, fprop, dgrad, wgrad (two operands each)."""
        records = [asdict(row) for row in self.rows]
        for record in records:
            record.update(record.pop("gemms"))
        return records

    @property
    def fingerprint(self) -> str:
        """Equal for plans that compute the same, whatever the rules are called."""
        rows = [(row.module, asdict(row.gemms)) for row in self.rows]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]

    def folded(self) -> tuple[FoldedRow, ...]:
        """Rows that differ in their layer only, as one; in the order of their first module."""
        groups: dict[tuple[Block, Role, Format, str], list[PlanRow]] = {}
        for row in self.rows:
            groups.setdefault((row.block, row.role, row.format, row.rule), []).append(row)
        return tuple(
            FoldedRow(
                block=block,
                role=role,
                format=number_format,
                rule=rule,
                layers=tuple(row.layer for row in rows if row.layer is not None),
                modules=len(rows),
            )
            for (block, role, number_format, rule), rows in groups.items()
        )


def precision_plan(policy: Policy, model: ModelConfig, key: str = "precision", place: Place = nowhere) -> PrecisionPlan:
    """Decide the format of every module: the first rule that selects it, else the default.

    Args:
        policy: as parsed.
        model: the architecture; its layout plays no part.
        key: dotted name of the policy in messages.
        place: where a key was written.

    Raises:
        UserError: a layer that the model does not have, or a rule that selects nothing, or nothing that an earlier
            rule has not decided.
    """
    modules = linear_modules(model)
    depth = len(model.pattern)
    selections = [
        _selection(rule, modules, depth, f"{key}.rules[{index}]", place) for index, rule in enumerate(policy.rules)
    ]
    deciders = [_first(module, selections) for module in modules]
    for index, rule in enumerate(policy.rules):
        if index not in deciders and not rule.optional:
            raise _shadowed(policy.rules, selections, index, f"{key}.rules[{index}]", place)
    operands = {name: gemms(name, policy.nvfp4) for name in (policy.default, *(rule.format for rule in policy.rules))}

    def row(module: LinearModule, decider: int | None) -> PlanRow:
        rule = None if decider is None else policy.rules[decider]
        number_format = rule.format if rule else policy.default
        return PlanRow(
            module=module.name,
            layer=module.layer,
            block=module.block,
            role=module.role,
            format=number_format,
            rule=rule.label if rule else DEFAULT_RULE,
            gemms=operands[number_format],
        )

    return PrecisionPlan(tuple(map(row, modules, deciders)))


def _first(module: LinearModule, selections: Sequence[frozenset[LinearModule]]) -> int | None:
    return next((index for index, selected in enumerate(selections) if module in selected), None)


def _selection(
    rule: Rule, modules: Sequence[LinearModule], depth: int, key: str, place: Place
) -> frozenset[LinearModule]:
    layers = None if rule.layers is None else _layers(rule, depth, key, place)
    here = [module for module in modules if rule.block in (None, module.block)]
    if not here and not rule.optional:
        raise _matches_nothing(rule, key, place, f"the model has no {rule.block}", _without(rule))
    in_layers = [module for module in here if layers is None or module.layer in layers]
    if not in_layers and not rule.optional:
        why = f"its share of {depth} layers rounds to none"
        raise _matches_nothing(rule, key, place, why, "layers: last 1")
    roles = {module.role for module in in_layers}
    for role in rule.role or ():
        if role not in roles and not rule.optional:
            raise _no_role(rule, role, here, roles, key, place)
    return frozenset(module for module in in_layers if rule.role is None or module.role in rule.role)


def _layers(rule: Rule, depth: int, key: str, place: Place) -> frozenset[int]:
    chosen: set[int] = set()
    for selector in rule.layers or ():
        try:
            chosen.update(select(selector, depth, rule.rounding or "even"))
        except IllegalLayersError as error:
            what, where = f"{key}.layers={selector}", place(f"{key}.layers")
            raise UserError(what, where=where, why=str(error), nearest=error.nearest) from None
    return frozenset(chosen)


def _matches_nothing(rule: Rule, key: str, place: Place, why: str, nearest: str) -> UserError:
    return UserError(f"{key} ({rule.label})", where=place(key), why=f"matches nothing: {why}", nearest=nearest)


def _without(rule: Rule) -> str:
    return f"no such rule, or optional: true to keep it for models with {rule.block}"


def _no_role(
    rule: Rule, role: Role, here: Iterable[LinearModule], roles: set[Role], key: str, place: Place
) -> UserError:
    elsewhere = sorted(module.layer for module in here if module.role == role and module.layer is not None)
    if elsewhere:
        shown = ", ".join(map(str, elsewhere[:12])) + (", ..." if len(elsewhere) > 12 else "")
        why = f"none of these layers has {role}; layers {shown} do"
        return _matches_nothing(rule, key, place, why, f"layers: {elsewhere[-1]}")
    if any(module.role == role for module in here):
        why = f"only MTP has {role}, and its layers have no global number"
        return _matches_nothing(rule, key, place, why, "the rule without layers")
    place_of = "the model" if rule.block is None else f"the model's {rule.block}"
    why = f"{place_of} has no {role}; it has {', '.join(sorted(roles))}"
    close = nearest_name(role, sorted(roles)) or min(roles)
    return _matches_nothing(rule, key, place, why, f"role: {close}, or optional: true to keep it for other models")


def _shadowed(
    rules: Sequence[Rule], selections: Sequence[frozenset[LinearModule]], index: int, key: str, place: Place
) -> UserError:
    earlier = [other for other in range(index) if selections[other] & selections[index]]
    stem = key.rpartition("[")[0]
    names = " and ".join(f"{stem}[{other}] ({rules[other].label})" for other in earlier)
    why = f"decides nothing: {names} decided all that it selects, and the first match wins"
    return UserError(
        f"{key} ({rules[index].label})", where=place(key), why=why, nearest=f"put it before {stem}[{earlier[0]}]"
    )
