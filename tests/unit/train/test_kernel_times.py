"""nvidia-resiliency-ext's kernel times: who gets them, and what its own reports come to."""

from __future__ import annotations

from typing import Any

import pytest

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform import select
from nemotron3_megatron.train.callbacks.kernel_times import Kernels, kernel_times, kernels_of


def test_a_cpu_has_none() -> None:
    assert kernel_times("auto", select("cpu")) is None
    assert kernel_times("own", select("cpu")) is None
    with pytest.raises(UserError, match="no CUDA kernels on a CPU"):
        kernel_times("nvrx", select("cpu"))


def test_what_its_reports_say() -> None:
    """Its own generator makes them, from summaries such as CUPTI gives; the first report is the rank's best."""
    pytest.importorskip("nvidia_resiliency_ext", reason="nvidia-resiliency-ext is not installed (glibc 2.39)")
    from nvidia_resiliency_ext.attribution.straggler import Statistic
    from nvidia_resiliency_ext.attribution.straggler.reporting import ReportGenerator

    def kernel(milliseconds: float, number: int) -> dict[Any, float]:
        names = (Statistic.MIN, Statistic.MAX, Statistic.MED, Statistic.AVG)
        return {**dict.fromkeys(names, milliseconds), Statistic.STD: 0.0, Statistic.NUM: number}

    generator = ReportGenerator(["individual_perf_scores"], gather_on_rank0=False)
    first = generator.generate_report({}, {"gemm": kernel(2.0, 10), "scan": kernel(1.0, 20)})
    assert kernels_of(first) == Kernels(busy=40.0, slower=1.0)
    collective = {"ncclDevKernel_AllReduce_Sum": kernel(500.0, 1)}
    second = generator.generate_report({}, {"gemm": kernel(4.0, 10), "scan": kernel(2.0, 20)} | collective)
    assert kernels_of(second) == Kernels(busy=80.0, slower=pytest.approx(2.0))
    assert kernels_of(generator.generate_report({}, {})) is None
