"""Durations that carry their unit: ``20T tokens``, ``500 steps``, ``90 min``.

Recipes never hold a bare number of steps or tokens. A duration is converted once, in ``resolve``, where
the number of tokens in a step is known.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal

Unit = Literal["tokens", "steps", "seconds"]

_MULTIPLIERS: dict[str, int] = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS: dict[str, float] = {"s": 1, "sec": 1, "min": 60, "h": 3600, "days": 86400}
_NAMES = {"tokens": "tokens", "steps": "steps", "seconds": "s"}
_FORM = re.compile(r"^\s*([0-9][0-9_]*(?:\.[0-9]+)?)\s*([KMBT]?)\s*([a-z]+)\s*$")
_EXAMPLES = "'20T tokens', '500 steps' or '90 min'"


@dataclass(frozen=True, slots=True)
class Duration:
    """An amount of training in tokens, optimizer steps or wall-clock seconds."""

    value: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> Duration:
        """Read ``'<number>[K|M|B|T] <unit>'``; units are tokens, steps, s, sec, min, h, days.

        Raises:
            ValueError: the text has another form; the message shows legal examples.
        """
        match = _FORM.match(text)
        if match is None:
            raise ValueError(f"{text!r} is not a duration; write it with its unit, such as {_EXAMPLES}")
        number = float(match[1].replace("_", "")) * _MULTIPLIERS[match[2]]
        if not math.isfinite(number):
            raise ValueError(f"{text!r} is too large a number; write something like {_EXAMPLES}")
        name = match[3]
        if name in ("token", "tokens"):
            return cls(number, "tokens")
        if name in ("step", "steps"):
            return cls(number, "steps")
        if name in _SECONDS:
            return cls(number * _SECONDS[name], "seconds")
        raise ValueError(f"{text!r} has the unknown unit {name!r}; legal durations look like {_EXAMPLES}")

    def in_steps(self, tokens_per_step: int) -> int:
        """Whole optimizer steps that cover this duration (rounded up).

        Raises:
            ValueError: the duration is a wall-clock time.
        """
        if self.unit == "seconds":
            raise ValueError(f"{self} is a wall-clock time and cannot be converted to steps")
        return math.ceil(self.value if self.unit == "steps" else self.value / tokens_per_step)

    def in_tokens(self, tokens_per_step: int) -> int:
        """Tokens in this duration; steps are multiplied by ``tokens_per_step``.

        Raises:
            ValueError: the duration is a wall-clock time.
        """
        if self.unit == "seconds":
            raise ValueError(f"{self} is a wall-clock time and cannot be converted to tokens")
        return round(self.value if self.unit == "tokens" else self.value * tokens_per_step)

    def __str__(self) -> str:
        """The shortest form that ``parse`` reads back to exactly this duration."""
        name = _NAMES[self.unit]
        suffixes = ("T", "B", "M", "K", "") if self.unit == "tokens" else ("",)
        for suffix in suffixes:
            scaled = self.value / _MULTIPLIERS[suffix]
            if (text := f"{scaled:g}{suffix} {name}") and scaled >= 1 and self._is(text):
                return text
        return f"{Decimal(self.value):f} {name}"

    def _is(self, text: str) -> bool:
        return _FORM.match(text) is not None and Duration.parse(text) == self


NO_TOKENS = Duration(0, "tokens")
EACH_STEP = Duration(1, "steps")
EVERY_10_STEPS = Duration(10, "steps")
EVERY_100_STEPS = Duration(100, "steps")
ONE_MINUTE = Duration(60, "seconds")
TEN_MINUTES = Duration(600, "seconds")
FOUR_HOURS = Duration(4 * 3600, "seconds")
