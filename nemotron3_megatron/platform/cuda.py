"""A machine with CUDA: Megatron-Core as it is, with NCCL."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Literal

import torch

from nemotron3_megatron.accelerators import data_sheet
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform.base import Spec
from nemotron3_megatron.platform.cpu import unfused_flags
from nemotron3_megatron.platform.kernel_cache import announce_compilation

_TE_SPEC_MODULES = ("transformer_engine.pytorch", "mamba_ssm.ops.triton.ssd_combined", "causal_conv1d")


@dataclass(frozen=True, slots=True)
class CudaPlatform:
    """See :class:`nemotron3_megatron.platform.base.Platform`."""

    default_spec: Spec
    name: Literal["cuda"] = "cuda"
    collective_backend: Literal["nccl"] = "nccl"

    @property
    def device(self) -> torch.device:
        """This rank's GPU, after ``start``."""
        return torch.device("cuda", torch.cuda.current_device())

    @property
    def peak_flops(self) -> float | None:
        """Of the data sheet."""
        sheet = data_sheet(torch.cuda.get_device_name())
        return sheet.bf16 if sheet else None

    def start(self, local_rank: int) -> None:
        """Take the GPU with the number ``local_rank``."""
        visible = torch.cuda.device_count()
        if local_rank >= visible:
            raise UserError(
                f"local rank {local_rank}",
                where="torchrun",
                why=f"this node has {visible} visible GPUs, and every rank needs its own",
                nearest=f"--nproc-per-node={visible}",
            )
        torch.cuda.set_device(local_rank)
        announce_compilation()

    def megatron_flags(self, spec: Spec | None = None) -> dict[str, object]:
        """Fused kernels with Transformer Engine, none without.

        Left off with both: bias and dropout fusions (these models have neither biases nor dropout), RoPE fusion
        (no RoPE), and fused masked softmax (Transformer Engine brings its own attention).
        """
        spec = spec or self.default_spec
        flags = {"use_cpu_initialization": False, **unfused_flags()}
        if spec == "torch":
            return flags
        if missing := missing_modules(_TE_SPEC_MODULES):
            raise UserError(
                "model.spec=te",
                why=f"cannot import {' and '.join(missing)} (`nemotron3 doctor` says how to install them)",
                nearest="model.spec=torch",
            )
        return flags | {
            "transformer_impl": "transformer_engine",
            # Transformer Engine's GEMMs add weight gradients into the FP32 buffers themselves.
            "gradient_accumulation_fusion": True,
            "use_fused_weighted_squared_relu": True,
            "moe_permute_fusion": True,
            "moe_grouped_gemm": True,
        }

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize()

    def peak_memory_bytes(self) -> int:
        """Most bytes of tensors on the GPU so far."""
        return torch.cuda.max_memory_allocated()

    def describe(self) -> str:
        """One line for the start of a log."""
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return (
            f"{torch.cuda.device_count()}x {properties.name} a node, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}, NCCL, CUDA {torch.version.cuda}, torch {torch.__version__}, "
            f"spec {self.default_spec}"
        )


def is_usable() -> bool:
    """Whether torch can use a GPU here."""
    return torch.cuda.is_available()


def missing_modules(names: tuple[str, ...]) -> list[str]:
    """Those of ``names`` that cannot be imported (compiled extensions can be installed and still not load)."""
    missing = []
    for name in names:
        try:
            importlib.import_module(name)
        except (ImportError, OSError, RuntimeError):
            missing.append(name)
    return missing


def open_platform() -> CudaPlatform:
    """The CUDA platform with the fastest spec that is installed.

    Raises:
        UserError: torch sees no GPU.
    """
    if not is_usable():
        built = "torch was built without CUDA" if torch.version.cuda is None else "torch finds no GPU or no driver"
        raise UserError("device=cuda", why=f"{built} (`nemotron3 doctor` says more)", nearest="device=cpu")
    return CudaPlatform("torch" if missing_modules(_TE_SPEC_MODULES) else "te")
