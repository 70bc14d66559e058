"""Which ranks hold up the others: step times of all ranks, gathered every so many steps.

Ranks of a step wait for each other, so its wall time is nearly the same everywhere. What tells them apart is the time
a rank spends by itself between two steps (data, callbacks, the operating system), the speed of a fixed piece of work
on its device, timed where nobody waits, and, where nvidia-resiliency-ext measures them, the times of its own kernels.
"""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

from nemotron3_megatron.platform import Platform
from nemotron3_megatron.telemetry.incidents import IncidentLog
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.callbacks.kernel_times import Kernels, KernelTimes

_log = logging.getLogger(__name__)

PROBE_SIZE = {"cpu": 192, "cuda": 2048}
"""Of the square matrices of the probe: about a millisecond on one core, and on one GPU."""
PROBE_REPEATS = 5
RANK_TIMES = "rank_times.json"
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
    kernels: Kernels | None = None
    """Of the last step; None where nobody measures them."""


class Stragglers(Callback):
    """Stands last but for the judge; on every rank."""

    def __init__(
        self,
        due: Callable[[int], bool],
        factor: float,
        platform: Platform,
        incidents: IncidentLog,
        run_dir: Path,
        kernel_times: KernelTimes | None = None,
    ) -> None:
        """Prepare.

        Args:
            due: whether times are gathered after so many steps.
            factor: a rank that is slower than the median by it is named.
            platform: of this rank.
            incidents: where it is recorded.
            run_dir: gets RANK_TIMES, of the last gathering.
            kernel_times: measures the steps at whose end times are gathered.
        """
        self._due, self._factor = due, factor
        self._platform = platform
        self._incidents = incidents
        self._run_dir = run_dir
        self._kernel_times = kernel_times
        self._steps: list[float] = []
        self._gaps: list[float] = []
        self._left_at: float | None = None

    def started(self, progress: Progress) -> None:
        self._left_at = None

    def before_step(self, step: int) -> None:
        if self._left_at is not None:
            self._gaps.append(time.perf_counter() - self._left_at)
        if self._kernel_times is not None and self._due(step):
            self._kernel_times.begin()

    def step_done(self, event: StepEvent) -> None:
        self._steps.append(event.step_time_s)
        if self._due(event.step):
            kernels = None if self._kernel_times is None else self._kernel_times.end()
            if self._gaps:
                self._gather(event.step, kernels)
        self._left_at = time.perf_counter()

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        if self._kernel_times is not None:
            self._kernel_times.close()

    def _gather(self, step: int, kernels: Kernels | None) -> None:
        host, probe = socket.gethostname(), probe_seconds(self._platform)
        mine = RankTimes(host, *percentiles(self._steps), median(self._gaps), probe, kernels)
        everyone: list[RankTimes] = [mine] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(everyone, mine)
        self._steps, self._gaps = [], []
        if torch.distributed.get_rank() == 0:
            _log.info("%s", summary(step, everyone))
            write_times(self._run_dir / RANK_TIMES, step, everyone)
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
    found += _slow_kernels(times, factor)
    return [text for _, text in sorted(found, reverse=True)]


def _slow_kernels(times: Sequence[RankTimes], factor: float) -> list[tuple[float, str]]:
    """Against the median rank: a slow GPU, or more work; against the rank's own best: a GPU that has become slow."""
    usual = median([t.kernels.busy for t in times if t.kernels is not None] or [0.0])
    found: list[tuple[float, str]] = []
    for rank, t in enumerate(times):
        if t.kernels is None:
            continue
        where, ratio = f"rank {rank} on {t.host}", t.kernels.busy / usual if usual else 1.0
        if ratio > factor:
            found.append((ratio, f"{where} is busy with kernels {ratio:.1f} times as long as the median rank"))
        if (slower := t.kernels.slower) > factor:
            found.append((slower, f"{where} takes {slower:.1f} times as long for its kernels as it once did"))
    return found


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


def write_times(path: Path, step: int, times: Sequence[RankTimes]) -> None:
    """Write the times of all ranks, in their order, whole or not at all."""
    partial = path.with_suffix(".partial")
    ranks = [asdict(each) for each in times]
    partial.write_text(json.dumps({"step": step, "ranks": ranks}) + "\n", encoding="utf-8")
    partial.replace(path)


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
