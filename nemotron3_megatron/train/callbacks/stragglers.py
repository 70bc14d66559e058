"""Which ranks hold up the others: step times of all ranks, gathered every so many steps.

Ranks of a step wait for each other, so its wall time is nearly the same everywhere. What tells them apart is the time
a rank spends by itself between two steps (data, callbacks, the operating system), and the speed of a fixed piece of
work on its device, timed where nobody waits.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch

from nemotron3_megatron.platform import Platform
from nemotron3_megatron.telemetry.incidents import IncidentLog
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent

_log = logging.getLogger(__name__)

PROBE_SIZE = {"cpu": 192, "cuda": 2048}
"""Of the square matrices of the probe: about a millisecond on one core, and on one GPU."""
PROBE_REPEATS = 5
SHORTEST_GAP_S = 0.01
"""Time between steps below this is never reported."""


@dataclass(frozen=True, slots=True)
class RankTimes:
    """Seconds of one rank since the last gathering."""

    host: str
    step_p50: float
    step_p95: float
    gap_p50: float
    """Between the end of a step's callbacks and the start of the next step."""
    probe: float
    """Of the fixed piece of work; the least of its repeats."""


class Stragglers(Callback):
    """Stands last but for the judge; on every rank."""

    def __init__(self, every: int, factor: float, platform: Platform, incidents: IncidentLog) -> None:
        self._every, self._factor = every, factor
        self._platform = platform
        self._incidents = incidents
        self._steps: list[float] = []
        self._gaps: list[float] = []
        self._left_at: float | None = None

    def started(self, progress: Progress) -> None:
        self._left_at = None

    def before_step(self, step: int) -> None:
        if self._left_at is not None:
            self._gaps.append(time.perf_counter() - self._left_at)

    def step_done(self, event: StepEvent) -> None:
        self._steps.append(event.step_time_s)
        if event.step % self._every == 0 and self._gaps:
            self._gather(event.step)
        self._left_at = time.perf_counter()

    def _gather(self, step: int) -> None:
        mine = RankTimes(
            socket.gethostname(), *percentiles(self._steps), median(self._gaps), probe_seconds(self._platform)
        )
        everyone: list[RankTimes] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self._steps, self._gaps = [], []
        if torch.distributed.get_rank() == 0:
            _log.info("%s", summary(step, everyone))
            for text in slow_ranks(everyone, self._factor):
                _log.warning("straggler: %s", text)
                self._incidents.add("straggler", step, text)


def percentiles(seconds: Sequence[float]) -> tuple[float, float]:
    """The median and the 95th percentile (the smallest value that 95 % do not exceed) of at least one time."""
    ordered = sorted(seconds)
    return median(ordered), ordered[max(-(-len(ordered) * 95 // 100) - 1, 0)]


def slow_ranks(times: Sequence[RankTimes], factor: float) -> list[str]:
    """One line for each rank that is slower than the median of all by ``factor``, worst first."""
    usual_gap, usual_probe = median(t.gap_p50 for t in times), median(t.probe for t in times)
    found: list[tuple[float, str]] = []
    for rank, t in enumerate(times):
        # A gap delays the whole step, so it is weighed against the step.
        late = t.gap_p50 - usual_gap
        if late > SHORTEST_GAP_S and t.gap_p50 > factor * usual_gap and late > (factor - 1) * 0.1 * t.step_p50:
            found.append((t.gap_p50 / usual_gap, f"rank {rank} on {t.host} starts its steps {late:.3f} s late"))
        if t.probe > factor * usual_probe:
            ratio = t.probe / usual_probe
            found.append((ratio, f"rank {rank} on {t.host} computes {ratio:.1f} times slower than the median rank"))
    return [text for _, text in sorted(found, reverse=True)]


def summary(step: int, times: Sequence[RankTimes]) -> str:
    """One line: the ranges of the ranks' percentiles."""
    parts = [
        f"{name} {min(values) * scale:.{digits}f}-{max(values) * scale:.{digits}f} {unit}"
        for name, values, scale, digits, unit in (
            ("step p50", [t.step_p50 for t in times], 1, 3, "s"),
            ("p95", [t.step_p95 for t in times], 1, 3, "s"),
            ("between steps", [t.gap_p50 for t in times], 1, 3, "s"),
            ("probe", [t.probe for t in times], 1000, 2, "ms"),
        )
    ]
    return f"step {step}, {len(times)} ranks: {', '.join(parts)}"


def probe_seconds(platform: Platform) -> float:
    """The least time of a few multiplications of one size, by this rank alone."""
    size = PROBE_SIZE[platform.name]
    dtype = torch.float32 if platform.name == "cpu" else torch.bfloat16
    matrix = torch.ones(size, size, dtype=dtype, device=platform.device)
    seconds = []
    for _ in range(PROBE_REPEATS):
        platform.synchronize()
        started = time.perf_counter()
        matrix @ matrix
        platform.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
