"""Limits of the GPUs that planning knows, as their vendor publishes them.

Peaks are dense (the data sheets print twice as much, with sparsity) and in operations a second, bandwidths in bytes
a second and one direction, memory in GiB.
"""

from __future__ import annotations

from dataclasses import dataclass

from nemotron3_megatron.config.recipe import GpuName
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.precision.policy import Format

_GIB_A_GB = 1e9 / 2**30
_TERA, _GIGA = 1e12, 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU and its share of the network."""

    name: GpuName
    bf16: float
    fp8: float
    fp4: float | None
    """None: no such units."""
    has_block_scales: bool
    """Whether tensor cores read MXFP8 and NVFP4; where not, they are emulated by BF16 GEMMs."""
    memory_gib: float
    memory_bandwidth: float
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


def gpu_of(run: Run) -> Gpu:
    """The GPU a plan is for: the recipe's, else H100 for a model all in BF16 and GB200 for one with quantised GEMMs."""
    quantised = any(row.format != "bf16" for row in run.precision_plan.rows)
    name = run.gpu or ("gb200" if quantised else "h100")
    return next(gpu for gpu in GPUS if gpu.name == name)
