"""Faults to inject, for tests: ``kill:rank=1,step=20``, several separated by ``;``."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

FaultKind = Literal["kill", "exit", "exception", "sigterm", "hang", "freeze", "slow", "nan", "flip", "spike"]
"""Before the step: kill (SIGKILL to itself), exit (status 3, without a word), exception, sigterm (to itself), hang
(sleeps for ever), freeze (the same in native code that holds Python's lock), slow (sleeps ``seconds``). In it: nan
(makes the decoder's output NaN), flip (the same, but only the first time that the step's batch is computed: what faulty
hardware does), spike (scales the decoder's output by 50)."""


class IllegalFaultError(ValueError):
    """Text that names no fault; ``str()`` says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault; ``step`` counts from 1, as records do."""

    kind: FaultKind
    rank: int = 0
    step: int = 1
    steps: int = 1
    """It lasts this many steps."""
    times: int = 1
    """At most so many times, however often the run is started again or rolled back; 0: always."""
    seconds: float = 1.0

    def due(self, step: int) -> bool:
        """Whether it happens in optimizer step ``step``."""
        return self.step <= step < self.step + self.steps


def parse_faults(text: str) -> tuple[Fault, ...]:
    """Read ``debug.fault``; nothing of an empty text.

    Raises:
        IllegalFaultError: an unknown kind, option or value.
    """
    return tuple(_parse(part.strip()) for part in text.split(";") if part.strip())


def _parse(text: str) -> Fault:
    kind, _, rest = text.partition(":")
    kinds: tuple[FaultKind, ...] = get_args(FaultKind)
    chosen = next((known for known in kinds if known == kind), None)
    if chosen is None:
        raise IllegalFaultError(f"{kind!r} is none of {', '.join(kinds)}")
    options: dict[str, float] = {}
    names = [item.name for item in fields(Fault) if item.name != "kind"]
    for part in filter(None, rest.split(",")):
        name, _, value = part.strip().partition("=")
        if name not in names:
            raise IllegalFaultError(f"{kind} has no option {name!r}; there are {', '.join(names)}")
        options[name] = _number(name, value)
    return Fault(kind=chosen, **options)  # type: ignore[arg-type]


def _number(name: str, value: str) -> float:
    try:
        number = float(value) if name == "seconds" else int(value)
    except ValueError:
        raise IllegalFaultError(f"{name}={value} is not a number") from None
    if number < (0 if name in ("rank", "times", "seconds") else 1):
        raise IllegalFaultError(f"{name}={value} is too small")
    return number
