"""E2M1, the 4-bit float of NVFP4 (OCP Microscaling Formats 1.0, section 5.3.3): sign, 2 exponent bits, 1 mantissa bit.

A code is 0..15; 8 is the sign. Inside a binade the values are evenly spaced and their codes consecutive, so rounding is
integer rounding of ``magnitude * codes_per_unit``, and the even code is the even mantissa.
"""

from __future__ import annotations

import torch
from torch import Tensor

MAX = 6.0
"""The largest magnitude."""

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""Value of each code."""


def encode_nearest(x: Tensor) -> Tensor:
    """Round to the nearest value, halves to the even code, saturating at 6.

    As in Transformer Engine's Python reference, NaN becomes code 0 and only ``x < 0`` has the sign: -0.0 is code 0, a
    negative number that rounds to zero is code 8.

    Args:
        x: float32, any shape.

    Returns:
        uint8 codes of the same shape.
    """
    position, first_code = _in_binade(x)
    return _with_sign(first_code + position.round(), x)


def encode_stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """Round to one of the two neighbouring values, up with probability (distance from the lower) / (their distance).

    Probabilities are multiples of 2^-24, so an expectation is off by less than 2^-24 of the neighbours' distance.
    Values of the format, magnitudes above 6, NaN and signs: as in :func:`encode_nearest`.

    Args:
        x: float32, any shape.
        generator: source of one uniform number an element, on ``x``'s device.

    Returns:
        uint8 codes of the same shape.
    """
    position, first_code = _in_binade(x)
    lower = position.floor()
    up = torch.rand(x.shape, generator=generator, device=x.device) < position - lower
    return _with_sign(first_code + lower + up, x)


def decode(codes: Tensor) -> Tensor:
    """uint8 codes to float32 values of the same shape."""
    return torch.tensor(VALUES, device=codes.device)[codes.int()]


def _in_binade(x: Tensor) -> tuple[Tensor, Tensor]:
    """Magnitude in units of its binade's spacing, and what to add to the rounded number to have the code: exact."""
    magnitude = x.abs().nan_to_num(nan=0.0).clamp(max=MAX)
    below_2, below_4 = magnitude < 2, magnitude < 4
    codes_per_unit = torch.where(below_2, 2.0, torch.where(below_4, 1.0, 0.5))
    first_code = torch.where(below_2, 0.0, torch.where(below_4, 2.0, 4.0))
    return magnitude * codes_per_unit, first_code


def _with_sign(magnitude_code: Tensor, x: Tensor) -> Tensor:
    return magnitude_code.to(torch.uint8) + 8 * (x < 0).to(torch.uint8)
