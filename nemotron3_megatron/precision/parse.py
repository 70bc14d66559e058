"""Plain data, as YAML gives it, to a checked policy."""

from __future__ import annotations

from collections.abc import Mapping

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import Place, show, typed
from nemotron3_megatron.precision.layers import IllegalLayersError, check_selector, is_share
from nemotron3_megatron.precision.modules import FIXED
from nemotron3_megatron.precision.policy import Nvfp4, Policy, Rule

WEIGHT_BLOCKS = ((16, 16), (1, 16))
"""Transformer Engine's two weight scalings, 2D and 1D (``disable_2d_quantization``)."""

HADAMARD_SIZE = 16
"""Transformer Engine's kernels have no other (``pytorch/tensor/nvfp4_tensor.py``)."""


def nowhere(_key: str) -> str | None:
    """For data that no file holds."""
    return None


def parse_policy(data: object, key: str = "precision", place: Place = nowhere) -> Policy:
    """Read a policy: ``default``, ``rules`` and ``nvfp4``.

    Args:
        data: mapping; in a rule, a single role or layer selector may stand without its list.
        key: dotted name of ``data`` in messages.
        place: where a key was written.

    Raises:
        UserError: unknown or missing key, unknown format, role or selector, a rule that can select nothing.
    """
    policy: Policy = typed(Policy, normalised(data, key, place), key, place)
    check_policy(policy, key, place)
    return policy


def normalised(data: object, key: str = "precision", place: Place = nowhere) -> object:
    """The same data with a list wherever a rule may have one value or several, and ``on`` read as a name.

    Raises:
        UserError: a rule names the embedding, the output layer or the router, which are no roles.
    """
    if not isinstance(data, Mapping):
        return data
    result = dict(data)
    if isinstance(rules := data.get("rules"), list | tuple):
        result["rules"] = [_with_lists(rule) for rule in rules]
        for index, rule in enumerate(result["rules"]):
            _check_fixed(rule, f"{key}.rules[{index}].role", place)
    if isinstance(nvfp4 := data.get("nvfp4"), Mapping) and isinstance(hadamard := nvfp4.get("hadamard"), Mapping):
        # YAML 1.1 reads an unquoted ``on`` as true.
        named = {"on" if name is True else name: value for name, value in hadamard.items()}
        result["nvfp4"] = {**nvfp4, "hadamard": named}
    return result


def _with_lists(rule: object) -> object:
    if not isinstance(rule, Mapping):
        return rule
    several = dict(rule)
    for name in {"layers", "role"} & several.keys():
        value = several[name]
        if value is not None:
            items = value if isinstance(value, list | tuple) else [value]
            several[name] = [_text(item) for item in items] if name == "layers" else list(items)
    return several


def _text(layer: object) -> object:
    """YAML reads ``7`` as a number."""
    is_number = isinstance(layer, int | float) and not isinstance(layer, bool)
    return str(layer) if is_number else layer.strip() if isinstance(layer, str) else layer


def check_policy(policy: Policy, key: str = "precision", place: Place = nowhere) -> None:
    """Check what types do not say and no model is needed for.

    Raises:
        UserError: as ``parse_policy``.
    """
    for index, rule in enumerate(policy.rules):
        _check_rule(rule, f"{key}.rules[{index}]", place)
    _check_nvfp4(policy.nvfp4, f"{key}.nvfp4", place)


def _check_rule(rule: Rule, key: str, place: Place) -> None:
    for name in ("layers", "role"):
        if getattr(rule, name) == ():
            where = place(f"{key}.{name}")
            why, nearest = "an empty list selects nothing", f"leave {name} out to select any"
            raise UserError(f"{key}.{name}=[]", where=where, why=why, nearest=nearest)
    if rule.layers is None and rule.role is None and rule.block is None:
        raise UserError(
            key,
            where=place(key),
            why="has none of layers, role and block, so it would select everything",
            nearest=f"default: {rule.format}, without this rule",
        )
    for selector in rule.layers or ():
        try:
            check_selector(selector)
        except IllegalLayersError as error:
            what, where = f"{key}.layers={selector}", place(f"{key}.layers")
            raise UserError(what, where=where, why=str(error), nearest=error.nearest) from None
    if rule.layers and rule.block == "mtp":
        raise UserError(
            f"{key}.block=mtp",
            where=place(f"{key}.block"),
            why="layers are the decoder's; MTP's have no global number",
            nearest="block: mtp without layers, as a rule of its own",
        )
    if rule.rounding and not any(is_share(selector) for selector in rule.layers or ()):
        raise UserError(
            f"{key}.rounding={rule.rounding}",
            where=place(f"{key}.rounding"),
            why="there is no share to round among layers",
            nearest="layers: last 15%, or no rounding",
        )


def _check_nvfp4(nvfp4: Nvfp4, key: str, place: Place) -> None:
    if nvfp4.weight_block not in WEIGHT_BLOCKS:
        why = f"the blocks of a weight are {' or '.join(show(block) for block in WEIGHT_BLOCKS)}"
        what, where = f"{key}.weight_block={show(nvfp4.weight_block)}", place(f"{key}.weight_block")
        raise UserError(what, where=where, why=why, nearest=f"{key}.weight_block={show(WEIGHT_BLOCKS[0])}")
    if nvfp4.hadamard and nvfp4.hadamard.size != HADAMARD_SIZE:
        what, where = f"{key}.hadamard.size={nvfp4.hadamard.size}", place(f"{key}.hadamard.size")
        why = f"the transform has size {HADAMARD_SIZE}, that of a block"
        raise UserError(what, where=where, why=why, nearest=f"{key}.hadamard.size={HADAMARD_SIZE}, or hadamard: null")


def _check_fixed(rule: object, key: str, place: Place) -> None:
    """Say why these are no roles, where ``typed`` could only list the others."""
    roles = rule.get("role") if isinstance(rule, Mapping) else None
    for role in roles or ():
        if isinstance(role, str) and role in FIXED:
            why = f"is {FIXED[role]} under every policy: Megatron-Core consults no precision rule there"
            raise UserError(f"{key}={role}", where=place(key), why=why, nearest=f"the rule without {role}")
