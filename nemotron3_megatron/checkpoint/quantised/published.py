"""The settings under which the published quantised Nemotron 3 Super was made from the BF16 model.

Sources, read in November 2026: NVIDIA-NeMo/Nemotron ``docs/nemotron/super3/quantization.md`` (tables of both
checkpoints, calibration sequences, distillation), and the file that NVIDIA Model-Optimizer ships as the published NVFP4
checkpoint's own, ``modelopt_recipes/models/nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16/ptq/nvfp4-mse.yaml``.
The published NVFP4 formats were found by a search over sensitivities (AutoQuantize); here is what it found by role.
"""

from __future__ import annotations

from typing import Literal

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.precision.modules import LEAVES, linear_modules
from nemotron3_megatron.precision.policy import Role
from nemotron3_megatron.precision.shapes import MULTIPLE, weight_shape

Settings = Literal["nvfp4", "fp8"]
"""nvfp4: for Blackwell; fp8: for Hopper."""

Narrow = Literal["nvfp4", "fp8"]
"""NVFP4 in blocks of (1, 16), weights and inputs; or E4M3 with one scale for the tensor, weights and inputs."""

_ROUTED: tuple[Role, ...] = ("moe.experts.fc1", "moe.experts.fc2")
_OTHERS: tuple[Role, ...] = ("moe.shared.fc1", "moe.shared.fc2", "mamba.in_proj", "mamba.out_proj")

FORMATS: dict[Settings, dict[Role, Narrow]] = {
    "nvfp4": {**dict.fromkeys(_ROUTED, "nvfp4"), **dict.fromkeys(_OTHERS, "fp8")},
    "fp8": dict.fromkeys((*_ROUTED, *_OTHERS), "fp8"),
}
"""Of the decoder. What is not named stays as trained: attention, latent projections, router, embedding, output and MTP.
Keys and values are cached in FP8 under both."""

SEQUENCES: dict[Settings, int] = {"nvfp4": 512, "fp8": 256}
"""Of the calibration."""

LEARNING_RATE = 1e-5
"""Of quantisation-aware distillation; the published one read 5 billion tokens."""

LEAF: dict[Role, str] = {role: leaf for leaves in LEAVES.values() for role, leaf in leaves}
"""Name of a role's linear in its layer."""


def narrow_linears(model: ModelConfig, settings: Settings) -> dict[str, Narrow]:
    """Format of every linear that is quantised, by the precision plan's module name.

    Raises:
        UserError: the model has none, or NVFP4's blocks do not fit one.
    """
    formats = FORMATS[settings]
    rows = [row for row in linear_modules(model) if row.block == "decoder" and row.role in formats]
    if not rows:
        why = f"the model has no {', '.join(formats)}"
        raise UserError(f"settings={settings}", where="command line", why=why, nearest="nemotron3 export")
    for row in rows:
        _, inputs = weight_shape(row.role, model)
        if formats[row.role] == "nvfp4" and inputs % MULTIPLE["nvfp4"]:
            why = f"{row.name} has {inputs} inputs, and NVFP4 needs a multiple of {MULTIPLE['nvfp4']}"
            raise UserError(f"settings={settings}", where="command line", why=why, nearest="settings=fp8")
    return {row.name: formats[row.role] for row in rows}


def attention_layers(model: ModelConfig) -> tuple[str, ...]:
    """Names of the decoder's attention modules, whose keys and values are cached."""
    rows = (row for row in linear_modules(model) if (row.block, row.role) == ("decoder", "attention.qkv"))
    return tuple(row.name.removesuffix(".linear_qkv") for row in rows)
