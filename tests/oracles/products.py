"""A linear's three GEMMs in float64, from the codes and scales of the formats.

Formats are assigned as in Transformer Engine's ``NVFP4BlockScaling`` and ``MXFP8BlockScaling``, written anew here.
"""

from __future__ import annotations

from torch import Tensor

from nemotron3_megatron.precision.formats import e2m1, mxfp8, nvfp4
from nemotron3_megatron.precision.policy import Format, Nvfp4


def exact(x: Tensor, number_format: Format, *, hadamard: bool = False, block: tuple[int, int] = (1, 16)) -> Tensor:
    """x quantised along its last dimension, in float64."""
    if number_format == "mxfp8":
        q8 = mxfp8.quantize(x)
        return q8.codes.double() * 2.0 ** (q8.scales.double() - 127).repeat_interleave(32, -1)
    q4 = nvfp4.quantize(x, block=block, hadamard=hadamard)
    scales = q4.scales.double().repeat_interleave(16, -1).repeat_interleave(block[0], 0)
    return e2m1.decode(q4.codes).double() * scales * q4.amax.double() / 2688


def products(x: Tensor, w: Tensor, dy: Tensor, number_format: Format, options: Nvfp4) -> tuple[Tensor, Tensor, Tensor]:
    """Y (T, N), dX (T, K) and dW (N, K) of x (T, K), w (N, K), dy (T, N); rounding to nearest."""
    if number_format == "bf16":
        return x.double() @ w.double().T, dy.double() @ w.double(), dy.double().T @ x.double()
    rotate = options.hadamard is not None and number_format == "nvfp4"
    block = (options.weight_block[0], options.weight_block[1])
    y = exact(x, number_format) @ exact(w, number_format, block=block).T
    dx = exact(dy, number_format) @ exact(w.T.contiguous(), number_format, block=block).T
    dy_tokens = exact(dy.T.contiguous(), number_format, hadamard=rotate)
    dw = dy_tokens @ exact(x.T.contiguous(), number_format, hadamard=rotate).T
    return y, dx, dw


def error(found: Tensor, reference: Tensor) -> float:
    """Relative Frobenius distance; 0 where both are zero."""
    distance = float((found.detach().double() - reference).norm())
    return distance / float(reference.norm()) if distance else 0.0
