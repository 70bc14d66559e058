"""A machine without CUDA: Megatron-Core on CPU with gloo."""

from __future__ import annotations

import logging
import os
import resource
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform.base import Spec, core_count

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CpuPlatform:
    """See :class:`nemotron3_megatron.platform.base.Platform`."""

    name: Literal["cpu"] = "cpu"
    collective_backend: Literal["gloo"] = "gloo"
    default_spec: Spec = "torch"

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    @property
    def peak_flops(self) -> None:
        """Unknown: CPUs are not compared by it."""
        return

    def start(self, local_rank: int) -> None:
        """One thread a rank unless OMP_NUM_THREADS says otherwise.

        One thread keeps results independent of the number of cores, and idle OpenMP threads spin: with two
        ranks of two threads on a busy 2-core machine, steps became ten times slower.
        """
        if "OMP_NUM_THREADS" not in os.environ:
            torch.set_num_threads(1)
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        if local_rank == 0 and ranks * torch.get_num_threads() > core_count():
            _log.warning(
                "%d ranks of %d threads share %d cores: steps will be slow; OMP_NUM_THREADS sets the threads of a rank",
                ranks,
                torch.get_num_threads(),
                core_count(),
            )

    def megatron_flags(self, spec: Spec | None = None) -> dict[str, object]:
        """Pure torch everywhere: no fused kernel, no grouped GEMM, no CUDA graph."""
        if spec == "te":
            raise UserError(
                "model.spec=te", why="Transformer Engine and mamba-ssm run on CUDA only", nearest="model.spec=torch"
            )
        return {"use_cpu_initialization": True, **unfused_flags()}

    def synchronize(self) -> None:
        """Nothing is pending: calls return when their work is done."""

    def peak_memory_bytes(self) -> int:
        """Peak resident memory of this process (VmHWM: getrusage would include the launcher's before exec)."""
        status = Path("/proc/self/status")
        if status.exists():
            for line in status.read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024

    def describe(self) -> str:
        """One line for the start of a log."""
        return f"CPU, {core_count()} cores, {torch.get_num_threads()} threads a rank, gloo, torch {torch.__version__}"


def unfused_flags() -> dict[str, object]:
    """TransformerConfig fields of the pure torch module spec."""
    return {
        "transformer_impl": "local",
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        "masked_softmax_fusion": False,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "apply_rope_fusion": False,
        "use_fused_weighted_squared_relu": False,
        "cross_entropy_loss_fusion": False,
        "moe_permute_fusion": False,
        "moe_grouped_gemm": False,
        "cuda_graph_impl": "none",
    }


def open_platform() -> CpuPlatform:
    """The CPU platform.

    Raises:
        UserError: CUDA is visible, so Megatron-Core is (or will be) imported unmodified.
    """
    if torch.cuda.is_available():
        raise UserError(
            "device=cpu",
            why="this machine has CUDA, and whether Megatron-Core runs on CPU is decided when it is imported",
            nearest='device=cpu with CUDA_VISIBLE_DEVICES="" in the environment, or device=cuda',
        )
    return CpuPlatform()
