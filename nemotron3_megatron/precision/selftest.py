"""Every (format, direction) that a plan uses, tried on this rank's device before the first step.

Kernels of the field have failed silently: stochastic rounding that returned zeros on one GPU model (Transformer
Engine pull request 3281), NaN gradients of grouped products (issue 3484). The check asks of each of the three GEMMs
that its result is finite, and as far from the exact product as the format's rounding takes it: no nearer either, so
that a backend which quantises nothing is found as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from nemotron3_megatron.precision.operands import Gemms
from nemotron3_megatron.precision.plan import PrecisionPlan
from nemotron3_megatron.precision.policy import Format

Linear = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""x (T, K), weight (N, K) and dY (T, N) -> Y (T, N), dX (T, K), dW (N, K), through the backend's real kernels."""

TOKENS, OUTPUTS, INPUTS = 128, 192, 256
"""Whole blocks of every format, and of Transformer Engine's fused kernels (rows by 64, columns by 128)."""

EXPECTED: Mapping[Format, tuple[float, float]] = {"nvfp4": (0.10, 0.22), "mxfp8": (0.02, 0.06)}
"""Relative Frobenius distance of a product of normal data from the exact one.

Operands are off by 9.5 % (blocks of 16), 11.1 % (16x16) or 13.7 % (stochastic rounding) in NVFP4 and by 2.7 % in
MXFP8; errors of the two operands add as squares: 13.4 to 19.4 %, and 3.8 %. The bounds leave a quarter around that.
"""


class PrecisionSelfTestError(RuntimeError):
    """The device does not compute what the plan needs."""


def directions(plan: PrecisionPlan) -> dict[Format, Gemms]:
    """The quantised formats in use, with their operands."""
    return {row.format: row.gemms for row in plan.rows if row.format in EXPECTED}


def self_test(
    used: Mapping[Format, Gemms], linears: Mapping[Format, Linear], device: torch.device, dtype: torch.dtype
) -> None:
    """Try the backend's linear of each format; a collective over the world.

    Args:
        used: formats of the plan (:func:`directions`).
        linears: one for each of them.
        device: this rank's.
        dtype: of parameters and activations.

    Raises:
        PrecisionSelfTestError: on every rank alike, if any rank's device failed.
    """
    failures = [failure for name, gemms in used.items() for failure in _try(name, gemms, linears[name], device, dtype)]
    everyone: list[list[str]] = [[]] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, failures)
    lines = [f"rank {rank}: {failure}" for rank, theirs in enumerate(everyone) for failure in theirs]
    if lines:
        more = f"\n... and {len(lines) - 20} more" if len(lines) > 20 else ""
        raise PrecisionSelfTestError("quantised GEMMs fail their self-test:\n" + "\n".join(lines[:20]) + more)


def _try(name: Format, gemms: Gemms, linear: Linear, device: torch.device, dtype: torch.dtype) -> list[str]:
    generator = torch.Generator().manual_seed(0)
    x, w, dy = (
        torch.randn(*shape, generator=generator).to(device, dtype)
        for shape in ((TOKENS, INPUTS), (OUTPUTS, INPUTS), (TOKENS, OUTPUTS))
    )
    exact = (x.float() @ w.float().T, dy.float() @ w.float(), dy.float().T @ x.float())
    first, second = linear(x, w, dy), linear(x, w, dy)
    low, high = EXPECTED[name]
    failures = []
    for gemm, found, again, reference in zip(("fprop", "dgrad", "wgrad"), first, second, exact, strict=True):
        distance = float((found.float() - reference).norm() / reference.norm())
        if not low < distance < high:  # also NaN
            failures.append(f"{name} {gemm} is {distance:.1%} from the exact product, expected {low:.0%} to {high:.0%}")
        draws = any(operand.rounding == "stochastic" for operand in getattr(gemms, gemm))
        if draws == torch.equal(found, again):
            planned = "stochastic" if draws else "to nearest"
            failures.append(
                f"{name} {gemm}: rounding should be {planned}, but two runs {'agree' if draws else 'differ'}"
            )
    return failures
