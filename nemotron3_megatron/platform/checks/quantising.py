"""The Triton kernels that emulate NVFP4 and MXFP8, against the torch reference on the same device.

Bit for bit; stochastic rounding, whose random numbers differ, by its mean.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nemotron3_megatron.platform.checks.kernel import Draw, relative_distance, require
from nemotron3_megatron.platform.checks.outcome import Comparison, Outcome, UnavailableError
from nemotron3_megatron.precision.emulation import reference
from nemotron3_megatron.precision.emulation.read import Read, read
from nemotron3_megatron.precision.operands import Operand, gemms
from nemotron3_megatron.precision.policy import Nvfp4

READS = 64
"""Stochastic reads whose mean is taken."""

STOCHASTIC_ERROR = 0.137
"""Relative distance of one stochastic read of normal numbers from its source (``precision.selftest``)."""

SCALE_ERROR = 0.011
"""What the mean of many stochastic reads keeps: where a block's scale was rounded down, its largest elements are cut
off at six steps. E4M3 scales are off by up to 1/16, half of them downwards, by 1/64 on average there; a block's largest
of 16 normal numbers has a quarter of its energy: sqrt(1/2 * 1/4) / 64 * 2 (the mean square lies above the mean's)."""


def quantise_nvfp4(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Rows, rotated columns, square blocks and stochastic rounding of NVFP4."""
    operands = gemms("nvfp4", Nvfp4())
    x, offsets = _source(device, dtype)
    activation, weight = operands.fprop
    rotated, gradient = operands.wgrad[1], operands.dgrad[0]
    found = (
        Comparison("rows, rotated columns", _differing(x, activation, rotated, offsets), 0.0),
        Comparison("square blocks", _differing(x, weight, None, None), 0.0),
        stochastic_mean(Draw(device, dtype).normal(1024, 2688), gradient),
    )
    return Outcome(found, note="share of numbers that differ; distance of the stochastic mean")


def quantise_mxfp8(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Rows and columns of MXFP8."""
    activation = gemms("mxfp8", Nvfp4()).fprop[0]
    x, offsets = _source(device, dtype)
    found = Comparison("rows, columns", _differing(x, activation, activation, offsets), 0.0)
    return Outcome((found,), note="share of numbers that differ")


def _source(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Normal numbers with outliers, and segments of rows, one of them empty."""
    require("triton")
    if device.type == "cpu":
        raise UnavailableError("a CUDA kernel")
    x = Draw(device, dtype).normal(1024, 2688)
    x[:, ::37] *= 20
    return x, torch.tensor([0, 96, 96, 512, 1024], dtype=torch.int32, device=device)


def _differing(x: Tensor, rows: Operand, columns: Operand | None, offsets: Tensor | None) -> float:
    return differing(
        read(x, rows, columns, offsets=offsets, fold=False),
        reference.read(x, rows, columns, offsets=offsets, fold=False),
    )


def differing(found: tuple[Read | None, Read | None], expected: tuple[Read | None, Read | None]) -> float:
    """Share of the numbers in values and scales that are not equal."""
    pairs = [
        (ours, theirs)
        for a, b in zip(found, expected, strict=True)
        if a is not None and b is not None
        for ours, theirs in ((a.values, b.values), (a.scale, b.scale))
        if ours is not None and theirs is not None
    ]
    unequal = sum(int((ours != theirs).sum()) for ours, theirs in pairs)
    return unequal / sum(ours.numel() for ours, _ in pairs)


def stochastic_mean(x: Tensor, operand: Operand) -> Comparison:
    """The mean of many reads of x (T, K) is nearer to x by the root of their number than one read: no bias, and no
    rounding to the nearest in disguise."""
    generator = torch.Generator(x.device).manual_seed(3)
    total = torch.zeros_like(x, dtype=torch.float32)
    for _ in range(READS):
        rows, _unused = read(x, operand, None, generator=generator, fold=True)
        assert rows is not None
        total += rows.values
    expected = math.hypot(STOCHASTIC_ERROR / math.sqrt(READS), SCALE_ERROR)
    return Comparison("stochastic mean", relative_distance(total / READS, x), 1.25 * expected)
