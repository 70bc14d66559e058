"""What each operand of a linear's three GEMMs goes through before it is multiplied.

Transformer Engine 2.20's assignment (``common/recipe/__init__.py``, ``NVFP4BlockScaling`` and ``MXFP8BlockScaling``),
which is the published one: 2D weight blocks shared by fprop and dgrad, Hadamard on both inputs of wgrad only,
stochastic rounding on gradients only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from nemotron3_megatron.precision.policy import Format, Nvfp4

Tensor = Literal["input", "weight", "gradient"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """One factor of a GEMM."""

    tensor: Tensor
    """``gradient``: of the module's output."""
    format: Format
    block: tuple[int, ...] | None = None
    """Elements that share a scale, the last count along the GEMM's reduction dimension; None: no scale."""
    rounding: Literal["nearest", "stochastic"] = "nearest"
    hadamard: int | None = None
    """Size of the Hadamard transform along the reduction dimension, applied before quantising; None: none."""

    @property
    def is_square(self) -> bool:
        """Whether blocks are as high as wide: quantised once, they serve both directions."""
        return self.block is not None and self.block[0] == self.block[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Gemms:
    """The GEMMs of a linear with input X (T, K), weight W (N, K) and output Y (T, N)."""

    fprop: tuple[Operand, Operand]
    """Y = X Wᵀ, reduced over K."""
    dgrad: tuple[Operand, Operand]
    """dX = dY W, reduced over N."""
    wgrad: tuple[Operand, Operand]
    """dW = dYᵀ X, reduced over T."""


def gemms(number_format: Format, nvfp4: Nvfp4) -> Gemms:
    """The operands of a module of the given format.

    Args:
        number_format: the module's.
        nvfp4: switches, of effect in NVFP4 modules only.
    """
    if number_format == "nvfp4":
        return _nvfp4(nvfp4)
    block = (1, 32) if number_format == "mxfp8" else None  # OCP MX: one E8M0 scale for 32 elements

    def operand(tensor: Tensor) -> Operand:
        return Operand(tensor=tensor, format=number_format, block=block)

    x, w, dy = operand("input"), operand("weight"), operand("gradient")
    return Gemms(fprop=(x, w), dgrad=(dy, w), wgrad=(dy, x))


def _nvfp4(options: Nvfp4) -> Gemms:
    size = options.hadamard.size if options.hadamard else None
    rounding: Literal["nearest", "stochastic"] = "stochastic" if options.stochastic_rounding else "nearest"

    def activation(hadamard: int | None) -> Operand:
        return Operand(tensor="input", format="nvfp4", block=(1, 16), hadamard=hadamard)

    def gradient(hadamard: int | None) -> Operand:
        return Operand(tensor="gradient", format="nvfp4", block=(1, 16), rounding=rounding, hadamard=hadamard)

    weight = Operand(tensor="weight", format="nvfp4", block=options.weight_block)
    return Gemms(
        fprop=(activation(None), weight),
        dgrad=(gradient(None), weight),
        wgrad=(gradient(size), activation(size)),
    )
