"""Limits of GPUs as their vendor publishes them: the one table that planning, MFU and the doctor read.

Peaks are dense (the data sheets print twice as much, with sparsity) and in operations a second, bandwidths in bytes
a second and one direction, memory in GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemotron3_megatron.config.recipe import GpuName
from nemotron3_megatron.precision.policy import Format

_GIB_A_GB = 1e9 / 2**30
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSheet:
    """What one GPU does at best."""

    device: str
    """Part of the name that the driver gives it."""
    bf16: float
    fp8: float | None
    """None: no such units."""
    memory_bandwidth: float
    nvlink_bandwidth: float | None
    """To all others together; None: reached over PCIe, or over a bridge that not every machine has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu(DataSheet):
    """One GPU that plans are made for, and its share of the network."""

    name: GpuName
    fp8: float
    fp4: float | None
    """None: no such units."""
    has_block_scales: bool
    """Whether tensor cores read MXFP8 and NVFP4; where not, they are emulated by BF16 GEMMs."""
    memory_gib: float
    nvlink_bandwidth: float
    nvlink_domain: int
    """GPUs that reach each other over NVLink."""
    network_bandwidth: float

    def is_native(self, number_format: Format) -> bool:
        """Whether tensor cores multiply this format."""
        return number_format == "bf16" or self.has_block_scales

    def peak(self, number_format: Format) -> float:
        """Operations a second at which a GEMM planned in this format runs at best (emulated: BF16's)."""
        if not self.is_native(number_format) or number_format == "bf16":
            return self.bf16
        return self.fp8 if number_format == "mxfp8" or self.fp4 is None else self.fp4


H100 = Gpu(  # NVIDIA H100 data sheet, SXM5: 989.4 / 1,978.9 TFLOP/s, 80 GB at 3.35 TB/s; DGX H100: 400 Gb/s a GPU
    name="h100",
    device="H100",
    bf16=989.4 * _TERA,
    fp8=1978.9 * _TERA,
    fp4=None,
    has_block_scales=False,
    memory_gib=80 * _GIB_A_GB,
    memory_bandwidth=3.35 * _TERA,
    nvlink_bandwidth=450 * _GIGA,  # NVLink 4: 900 GB/s both ways
    nvlink_domain=8,
    network_bandwidth=50 * _GIGA,
)
H200 = Gpu(  # NVIDIA H200 data sheet, SXM: H100's compute, 141 GB at 4.8 TB/s
    name="h200",
    device="H200",
    bf16=H100.bf16,
    fp8=H100.fp8,
    fp4=None,
    has_block_scales=False,
    memory_gib=141 * _GIB_A_GB,
    memory_bandwidth=4.8 * _TERA,
    nvlink_bandwidth=H100.nvlink_bandwidth,
    nvlink_domain=8,
    network_bandwidth=50 * _GIGA,
)
B200 = Gpu(  # NVIDIA HGX/DGX B200 data sheet, an eighth: 2.25 / 4.5 / 9 PFLOP/s, 180 GB at 8 TB/s, 400 Gb/s
    name="b200",
    device="B200",
    bf16=2250 * _TERA,
    fp8=4500 * _TERA,
    fp4=9000 * _TERA,
    has_block_scales=True,
    memory_gib=180 * _GIB_A_GB,
    memory_bandwidth=8 * _TERA,
    nvlink_bandwidth=900 * _GIGA,  # NVLink 5: 1.8 TB/s both ways
    nvlink_domain=8,
    network_bandwidth=50 * _GIGA,
)
B300 = Gpu(  # NVIDIA HGX B300 data sheet, an eighth: 2.25 / 4.5 / 13.5 PFLOP/s, 270 GB at 8 TB/s, 800 Gb/s
    name="b300",
    device="B300",
    bf16=2250 * _TERA,
    fp8=4500 * _TERA,
    fp4=13500 * _TERA,
    has_block_scales=True,
    memory_gib=270 * _GIB_A_GB,
    memory_bandwidth=8 * _TERA,
    nvlink_bandwidth=900 * _GIGA,
    nvlink_domain=8,
    network_bandwidth=100 * _GIGA,
)
GB200 = Gpu(  # NVIDIA GB200 NVL72 data sheet, a 72nd: 2.5 / 5 / 10 PFLOP/s, 186 GB at 8 TB/s, 400 Gb/s
    name="gb200",
    device="GB200",
    bf16=2500 * _TERA,
    fp8=5000 * _TERA,
    fp4=10000 * _TERA,
    has_block_scales=True,
    memory_gib=186 * _GIB_A_GB,
    memory_bandwidth=8 * _TERA,
    nvlink_bandwidth=900 * _GIGA,
    nvlink_domain=72,
    network_bandwidth=50 * _GIGA,
)
GB300 = Gpu(  # NVIDIA GB300 NVL72 data sheet, a 72nd: 2.5 / 5 / 15 PFLOP/s, 20 TB in all at 8 TB/s each, 800 Gb/s
    name="gb300",
    device="GB300",
    bf16=2500 * _TERA,
    fp8=5000 * _TERA,
    fp4=15000 * _TERA,
    has_block_scales=True,
    memory_gib=20_000 / 72 * _GIB_A_GB,
    memory_bandwidth=8 * _TERA,
    nvlink_bandwidth=900 * _GIGA,
    nvlink_domain=72,
    network_bandwidth=100 * _GIGA,
)
GPUS: tuple[Gpu, ...] = (H100, H200, B200, B300, GB200, GB300)
"""Those that plans are made for."""

DATA_SHEETS: tuple[DataSheet, ...] = (
    *GPUS,
    DataSheet(  # NVIDIA GH200 data sheet: H100's compute, 96 GB of HBM3 at 4 TB/s or 144 GB of HBM3e at 4.9; the lesser
        device="GH200",
        bf16=H100.bf16,
        fp8=H100.fp8,
        memory_bandwidth=4.0 * _TERA,
        nvlink_bandwidth=450 * _GIGA,
    ),
    DataSheet(  # NVIDIA H100 data sheet, PCIe: 756 / 1,513 TFLOP/s, 80 GB at 2 TB/s
        device="H100 PCIe",
        bf16=756 * _TERA,
        fp8=1513 * _TERA,
        memory_bandwidth=2.0 * _TERA,
        nvlink_bandwidth=None,
    ),
    DataSheet(  # NVIDIA H100 data sheet, NVL: 835 / 1,671 TFLOP/s, 94 GB at 3.9 TB/s
        device="H100 NVL",
        bf16=835 * _TERA,
        fp8=1671 * _TERA,
        memory_bandwidth=3.9 * _TERA,
        nvlink_bandwidth=None,
    ),
    DataSheet(  # NVIDIA A100 data sheet, SXM: 312 TFLOP/s, 40 GB at 1.555 TB/s or 80 GB at 2.039; the lesser
        device="A100-SXM",
        bf16=312 * _TERA,
        fp8=None,
        memory_bandwidth=1.555 * _TERA,
        nvlink_bandwidth=300 * _GIGA,  # NVLink 3: 600 GB/s both ways
    ),
    DataSheet(  # NVIDIA A100 data sheet, PCIe: the same
        device="A100",
        bf16=312 * _TERA,
        fp8=None,
        memory_bandwidth=1.555 * _TERA,
        nvlink_bandwidth=None,
    ),
)


def data_sheet(device_name: str) -> DataSheet | None:
    """The data sheet of a device by the driver's name for it ("NVIDIA H100 80GB HBM3"); None: not known here."""
    known = [sheet for sheet in DATA_SHEETS if sheet.device in device_name]
    return max(known, key=lambda sheet: len(sheet.device), default=None)
