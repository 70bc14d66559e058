"""The table of data sheets, by the names that drivers give."""

from __future__ import annotations

from typing import get_args

import pytest

from nemotron3_megatron.accelerators import DATA_SHEETS, GPUS, data_sheet
from nemotron3_megatron.config.recipe import GpuName


@pytest.mark.parametrize(
    ("name", "device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", "H100", 989.4),
        ("NVIDIA H100 PCIe", "H100 PCIe", 756),
        ("NVIDIA H100 NVL", "H100 NVL", 835),
        ("NVIDIA H200", "H200", 989.4),
        ("NVIDIA GH200 480GB", "GH200", 989.4),
        ("NVIDIA B200", "B200", 2250),
        ("NVIDIA GB200", "GB200", 2500),
        ("NVIDIA GB300", "GB300", 2500),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM", 312),
        ("NVIDIA A100-PCIE-40GB", "A100", 312),
    ],
)
def test_a_device_is_known_by_its_name(name: str, device: str, tflops: float) -> None:
    sheet = data_sheet(name)
    assert sheet is not None
    assert (sheet.device, sheet.bf16) == (device, tflops * 1e12)


def test_other_devices_are_not() -> None:
    assert data_sheet("NVIDIA GeForce RTX 5090") is None


def test_every_gpu_of_recipes_has_a_data_sheet() -> None:
    assert tuple(gpu.name for gpu in GPUS) == get_args(GpuName)
    assert all(data_sheet(f"NVIDIA {sheet.device}") is sheet for sheet in DATA_SHEETS)
