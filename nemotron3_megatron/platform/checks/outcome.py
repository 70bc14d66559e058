"""What a check found, and its verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

Verdict = Literal["pass", "fail", "skipped"]


class UnavailableError(Exception):
    """This machine lacks what the check needs; says what, and how to get it."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """One tensor of a kernel against its reference."""

    what: str
    """``y``, or ``d`` and the input that the gradient belongs to."""
    error: float
    """Relative distance in the Frobenius norm."""
    bound: float

    @property
    def passed(self) -> bool:
        """NaN does not."""
        return self.error <= self.bound


@dataclass(frozen=True, slots=True)
class Measurement:
    """One speed."""

    what: str
    value: float
    """Operations or bytes a second."""
    unit: Literal["FLOP/s", "B/s"]
    peak: float | None
    """Of the data sheet; None: not known."""
    least: float
    """Share of ``peak`` below which something is wrong."""

    @property
    def passed(self) -> bool:
        """Nothing is asked of a device without a data sheet."""
        return self.peak is None or self.value >= self.least * self.peak


@dataclass(frozen=True, slots=True)
class Outcome:
    """All that one check found."""

    comparisons: tuple[Comparison, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every part did; a check that found nothing did not."""
        verdicts = [each.passed for each in self.comparisons] + [each.passed for each in self.measurements]
        return bool(verdicts) and all(verdicts)


@dataclass(frozen=True, slots=True)
class Check:
    """One row of the doctor's table."""

    name: str
    run: Callable[[torch.device, torch.dtype], Outcome]
    """Takes the device and the type of parameters and activations.

    Raises:
        UnavailableError: the check cannot be made here.
    """


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a check."""

    name: str
    verdict: Verdict
    seconds: float
    outcome: Outcome = Outcome()
    reason: str = ""
    """Why it was skipped or what went wrong, in one line."""
    traceback: str = ""
