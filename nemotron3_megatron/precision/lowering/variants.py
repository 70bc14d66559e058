"""The finite set of ways in which a module can be quantised, by name.

Transformer Engine's custom recipes find their quantisers through an import path, so that each way has a name in
:mod:`nemotron3_megatron.precision.emulation.te` and :mod:`nemotron3_megatron.precision.lowering.native`.
"""

from __future__ import annotations

from itertools import product

from nemotron3_megatron.precision.operands import Gemms, gemms
from nemotron3_megatron.precision.policy import Hadamard, Nvfp4


def _nvfp4(square: bool, rotated: bool, stochastic: bool) -> tuple[str, Gemms]:
    off = [name for name, on in (("2d", square), ("rht", rotated), ("sr", stochastic)) if not on]
    options = Nvfp4(
        weight_block=(16, 16) if square else (1, 16),
        hadamard=Hadamard() if rotated else None,
        stochastic_rounding="gradients" if stochastic else None,
    )
    return "_no_".join(["nvfp4", *off]), gemms("nvfp4", options)


VARIANTS: dict[str, Gemms] = {
    "mxfp8": gemms("mxfp8", Nvfp4()),
    **dict(_nvfp4(*switches) for switches in product((True, False), repeat=3)),
}
"""``mxfp8``, ``nvfp4`` as published, and ``nvfp4`` without some of 2D weight blocks, rotation, stochastic rounding:
``nvfp4_no_rht``, ``nvfp4_no_2d_no_sr``, ..."""


def variant_name(operands: Gemms) -> str:
    """The name of a quantised module's operands.

    Raises:
        ValueError: BF16, or no combination of a policy's switches.
    """
    for name, variant in VARIANTS.items():
        if variant == operands:
            return name
    raise ValueError(f"no variant has the operands {operands}")
