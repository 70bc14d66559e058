"""How fast a run goes and when it ends: a step timer, and estimates that one slow step does not disturb."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from statistics import median

WARMUP_STEPS = 2
"""Steps after a start that are left out of estimates: allocations, compilation and caches make them slow."""
WINDOW_STEPS = 50
"""Steps an estimate looks back; long enough for a stable median, short enough to follow a change of load."""


def tokens_per_second(tokens: int, seconds: float) -> float:
    """Throughput in tokens/s; 0 for an interval too short to measure."""
    return tokens / seconds if seconds > 0 else 0.0


def remaining_seconds(recent: Iterable[float], remaining: float) -> float | None:
    """Median cost of a unit of work times the units that remain.

    The median ignores the occasional step that waits for a checkpoint, an evaluation or the file system.

    Args:
        recent: seconds per unit (step or token), newest steps of this start; values that are not finite are ignored.
        remaining: units still to do.

    Returns:
        Seconds, or None while nothing was measured.
    """
    measured = [seconds for seconds in recent if math.isfinite(seconds)]
    return median(measured) * max(remaining, 0) if measured else None


def format_duration(seconds: float | None) -> str:
    """``45s``, ``3m12s``, ``2h05m``, ``4d03h``; ``--`` when unknown."""
    if seconds is None or not math.isfinite(seconds):
        return "--"
    whole = round(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days}d{hours:02d}h"
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{whole % 60:02d}s" if minutes else f"{whole}s"


def format_count(value: float) -> str:
    """A count with three significant digits: ``999``, ``12.3k``, ``4.56M``, ``20.0T``."""
    for suffix, unit in (("", 1.0), ("k", 1e3), ("M", 1e6), ("B", 1e9), ("T", 1e12)):
        if abs(value) < 999.5 * unit or suffix == "T":
            scaled = value / unit
            digits = 0 if suffix == "" or abs(scaled) >= 99.95 else 1 if abs(scaled) >= 9.995 else 2
            return f"{scaled:.{digits}f}{suffix}"
    raise AssertionError("unreachable")


class Pace:
    """Seconds per unit of work over the recent steps of this start, without its warm-up."""

    def __init__(self, *, warmup: int = WARMUP_STEPS, window: int = WINDOW_STEPS) -> None:
        self._warmup_left = warmup
        self._recent: deque[float] = deque(maxlen=window)
        self._warmup_step: float | None = None

    def add(self, seconds_per_unit: float) -> None:
        """Account for one more step."""
        if self._warmup_left > 0:
            self._warmup_left -= 1
            self._warmup_step = seconds_per_unit
            return
        self._recent.append(seconds_per_unit)

    def remaining(self, units: float) -> float | None:
        """Seconds for ``units`` more; during warm-up from its last step, as the only evidence there is."""
        evidence = self._recent or ([] if self._warmup_step is None else [self._warmup_step])
        return remaining_seconds(evidence, units)


class StepTimer:
    """Wall-clock time of optimizer steps; what happens between ``stop`` and ``start`` does not count."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started: float | None = None

    def start(self) -> None:
        """Begin a step."""
        self._started = self._clock()

    def stop(self) -> float:
        """End the step and return its seconds.

        Raises:
            ValueError: no step was started.
        """
        if self._started is None:
            raise ValueError("StepTimer.stop without start")
        seconds, self._started = self._clock() - self._started, None
        return seconds
