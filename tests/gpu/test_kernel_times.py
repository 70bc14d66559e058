"""nvidia-resiliency-ext's Detector on a real GPU."""

from __future__ import annotations

import pytest
import torch

from nemotron3_megatron.platform import select
from nemotron3_megatron.train.callbacks.kernel_times import kernel_times

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]


def test_more_work_takes_its_kernels_longer() -> None:
    """Three times the same kernels are three times as busy, and each of them is as fast as before.

    The bounds are wide: a GPU's clock varies, and 50 products of 4096 x 4096 take milliseconds.
    """
    pytest.importorskip("nvidia_resiliency_ext", reason="nvidia-resiliency-ext is not installed")
    times = kernel_times("nvrx", select("cuda"))
    assert times is not None
    matrix = torch.ones(4096, 4096, device="cuda", dtype=torch.bfloat16)

    def step(products: int) -> None:
        for _ in range(products):
            matrix @ matrix

    try:
        assert times.end() is None, "nothing began"
        step(50)  # the first products choose kernels and wake the GPU up
        torch.cuda.synchronize()
        found = []
        for products in (50, 150):
            times.begin()
            step(products)
            found.append(times.end())
    finally:
        times.close()
    one, three = found
    assert one is not None
    assert three is not None
    assert one.slower == pytest.approx(1.0)
    assert 2.0 < three.busy / one.busy < 4.5
    assert 0.9 < three.slower < 1.5
