"""The random Hadamard transform of NVFP4 training: an orthogonal mix of 16 neighbours that spreads outliers.

The "random" signs are one fixed vector, the same for all layers and steps, as in Transformer Engine. Rotating both
operands of a GEMM along the contracted dimension leaves the product unchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

SIZE = 16
"""Elements mixed with each other (Transformer Engine's only size, and NVFP4's block)."""

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
"""Transformer Engine 2.20, ``pytorch/custom_recipes/reference_nvfp4.py:get_wgrad_sign_vector``."""

MATRIX = tuple(tuple(SIGNS[i] * (-1) ** (i & j).bit_count() / 4 for j in range(SIZE)) for i in range(SIZE))
"""Sylvester's Hadamard matrix with signed rows, over sqrt(16): orthogonal, each entry +-1/4."""


def rotate(x: Tensor) -> Tensor:
    """Multiply blocks of 16 along the last dimension by :data:`MATRIX`, from the right.

    Products are exact; sums are float32, then rounded to ``x``'s type, as in Transformer Engine (whose kernels take
    bfloat16 only). The order of each sum is the matrix product's: where 16 terms span so many binades that float32
    rounds (impossible within 12 binades for bfloat16), devices may differ in the last bit.

    Args:
        x: (..., n) floating point.

    Returns:
        (..., n), the type of ``x``.

    Raises:
        ValueError: n is not a multiple of 16.
    """
    if x.shape[-1] % SIZE:
        raise ValueError(f"the Hadamard transform needs a last dimension divisible by {SIZE}, not shape {(*x.shape,)}")
    matrix = torch.tensor(MATRIX, dtype=torch.float32, device=x.device)
    return (x.float().reshape(-1, SIZE) @ matrix).to(x.dtype).reshape(x.shape)
