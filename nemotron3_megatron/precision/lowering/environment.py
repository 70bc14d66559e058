"""Transformer Engine's settings in the environment that no precision plan may be contradicted by."""

from __future__ import annotations

from collections.abc import Mapping

from nemotron3_megatron.config.errors import UserError

NEUTRAL: dict[str, str] = {
    "NVTE_BACKWARD_OVERRIDE": "",
    "NVTE_NVFP4_DISABLE_RHT": "0",
    "NVTE_NVFP4_DISABLE_STOCHASTIC_ROUNDING": "0",
    "NVTE_NVFP4_DISABLE_2D_QUANTIZATION": "0",
    "NVTE_NVFP4_ROW_SCALED_ACTIVATION": "0",
    "NVTE_NVFP4_4OVER6": "none",
    "NVTE_USE_FAST_MATH": "0",
}
"""Variables that change the numerics of a whole process, and the values at which they do not (TE 2.20,
``common/recipe/__init__.py``, where they are defaults of dataclasses and so read at import; fast math, in
``csrc/quantizer.cpp``, divides by approximate reciprocals and leaves out the rounding after the rotation)."""


def check_environment(environment: Mapping[str, str]) -> None:
    """Refuse settings that would make modules compute something other than their rows.

    Raises:
        UserError: naming the variable.
    """
    for name, neutral in NEUTRAL.items():
        value = environment.get(name, neutral)
        if value != neutral:
            raise UserError(
                f"{name}={value}",
                where="environment",
                why="changes the numerics of every module, whatever the precision policy says",
                nearest=f"unset {name}; the policy's switches are nvfp4.hadamard, nvfp4.stochastic_rounding and "
                "nvfp4.weight_block",
            )
