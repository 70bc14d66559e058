"""Layer selectors: ``7``, ``3-9``, ``first 2``, ``last 14``, ``last 15%``, in global numbers from 0."""

from __future__ import annotations

import math
import re
from fractions import Fraction

from nemotron3_megatron.precision.policy import Rounding

_RANGE = re.compile(r"(\d+)(?:\s*-\s*(\d+))?", re.ASCII)
_END = re.compile(r"(first|last)\s+(\d+(?:\.\d+)?)\s*(%?)", re.ASCII)


class IllegalLayersError(ValueError):
    """A selector that selects nothing sensible; ``str()`` says why."""

    def __init__(self, why: str, nearest: str) -> None:
        super().__init__(why)
        self.nearest = nearest


def is_share(selector: str) -> bool:
    """True for a percentage of the layers."""
    return selector.endswith("%")


def check_selector(selector: str) -> None:
    """Check what can be known without a model.

    Raises:
        IllegalLayersError: not a selector, or one that is empty in every model.
    """
    if match := _RANGE.fullmatch(selector):
        first, last = int(match[1]), int(match[2] or match[1])
        if first > last:
            raise IllegalLayersError("a range goes from its lower to its higher layer", f"{last}-{first}")
    elif match := _END.fullmatch(selector):
        end, amount, percent = match[1], Fraction(match[2]), match[3]
        if not percent and amount.denominator != 1:
            raise IllegalLayersError("a number of layers is whole", f"{end} {math.ceil(amount)}")
        if amount == 0:
            raise IllegalLayersError("selects no layer", f"{end} {'15%' if percent else '1'}, or no such rule")
        if percent and amount > 100:
            raise IllegalLayersError("is more than all layers", f"{end} 100%")
    else:
        raise _unreadable(selector)


def select(selector: str, num_layers: int, rounding: Rounding) -> range:
    """The layers that a checked selector means in a model of ``num_layers``; empty if a share rounds to nothing.

    Raises:
        IllegalLayersError: the model has no such layer.
    """
    if match := _RANGE.fullmatch(selector):
        first, last = int(match[1]), int(match[2] or match[1])
        if last >= num_layers:
            start = min(first, num_layers - 1)
            nearest = str(num_layers - 1) if start == num_layers - 1 else f"{start}-{num_layers - 1}"
            raise IllegalLayersError(f"the model has layers 0 to {num_layers - 1}", nearest)
        return range(first, last + 1)
    match = _END.fullmatch(selector)
    assert match is not None, selector
    amount = Fraction(match[2])
    count = round_share(amount * num_layers / 100, rounding) if match[3] else int(amount)
    if count > num_layers:
        raise IllegalLayersError(f"the model has {num_layers} layers", f"{match[1]} {num_layers}")
    return range(count) if match[1] == "first" else range(num_layers - count, num_layers)


def round_share(layers: Fraction, rounding: Rounding) -> int:
    """A share of the layers as a number of layers (see ``Rounding``); halves go up."""
    if layers.denominator == 1 or rounding == "ceil":
        return math.ceil(layers)
    if rounding == "floor":
        return math.floor(layers)
    if rounding == "nearest":
        return math.floor(layers + Fraction(1, 2))
    return max(2 * math.floor(layers / 2 + Fraction(1, 2)), 1)


def _unreadable(selector: str) -> IllegalLayersError:
    forms = "layers are written 7, 3-9, first 2, last 14 or last 15%"
    if re.fullmatch(r"-[1-9]\d*", selector, re.ASCII):
        return IllegalLayersError(f"layers are numbered from 0; {forms}", f"last {selector[1:]}")
    number = re.search(r"[1-9]\d*", selector, re.ASCII)
    end = "first" if selector.lower().startswith("f") else "last"
    share = "%" if number is None or ("%" in selector and int(number[0]) <= 100) else ""
    return IllegalLayersError(forms, f"{end} {number[0] if number else 15}{share}")
