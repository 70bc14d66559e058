"""Times of this rank's CUDA kernels in single steps, taken by nvidia-resiliency-ext (CUPTI).

Of that package only its ``Detector`` is used, without its exchange between ranks: it gathers the names of all kernels
with their grids from all ranks, and grids of routed experts differ in every step.
"""

from __future__ import annotations

import logging
import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform import Platform

_log = logging.getLogger(__name__)

_COLLECTIVES = "ncclDev"
"""In the names of NCCL's kernels, which last until the slowest rank has come."""


@dataclass(frozen=True, slots=True)
class Kernels:
    """One step of one rank."""

    busy: float
    """Time in all kernels but NCCL's; only ratios between ranks are used."""
    slower: float
    """How many times as long they take as they did at best in this start, on average weighted by time; 1: as ever."""


class KernelTimes:
    """Measures the work between :meth:`begin` and :meth:`end`."""

    def __init__(self) -> None:
        """Prepare.

        Raises:
            ImportError: the package or its library for CUPTI cannot be loaded.
            RuntimeError: CUPTI refuses.
        """
        from nvidia_resiliency_ext.attribution.straggler import Detector

        self._detector: Any = Detector
        self._section: AbstractContextManager[None] | None = None
        Detector.initialize(scores_to_compute=["individual_perf_scores"], gather_on_rank0=False)

    def begin(self) -> None:
        """A step begins."""
        self._section = self._detector.detection_section("step", profile_cuda=True)
        self._section.__enter__()

    def end(self) -> Kernels | None:
        """The step is done; waits for the device. None: no kernel was seen, or nothing began."""
        if self._section is None:
            return None
        self._section.__exit__(None, None, None)
        self._section = None
        return kernels_of(self._detector.generate_report())

    def close(self) -> None:
        """Stop measuring."""
        self._detector.shutdown()


def kernels_of(report: Any) -> Kernels | None:
    """What a ``Report`` with this rank's own scores says; None if it saw no kernel."""
    from nvidia_resiliency_ext.attribution.straggler import Statistic

    times = [
        stats[Statistic.NUM] * stats[Statistic.AVG]
        for name, stats in report.local_kernel_summaries.items()
        if _COLLECTIVES not in name
    ]
    (score,) = report.gpu_individual_perf_scores.values()
    return Kernels(sum(times), 1 / score) if times and score > 0 and not math.isnan(score) else None


def kernel_times(choice: Literal["auto", "own", "nvrx"], platform: Platform) -> KernelTimes | None:
    """What ``resilience.straggler`` asks for; ranks need not agree, since each measures by itself.

    Raises:
        UserError: nvrx, and it cannot be had.
    """
    if choice == "own" or (choice == "auto" and platform.name == "cpu"):
        return None
    try:
        if platform.name == "cpu":
            raise RuntimeError("there are no CUDA kernels on a CPU")
        return KernelTimes()
    except (ImportError, RuntimeError) as error:
        if choice == "nvrx":
            nearest = "resilience.straggler=own, or make env-cuda"
            raise UserError("resilience.straggler=nvrx", why=str(error), nearest=nearest) from None
        _log.debug("kernels of slow ranks are not measured: %s", error)
    return None
