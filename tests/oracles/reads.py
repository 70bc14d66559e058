"""Sources to quantise, and what the reads of them must satisfy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from nemotron3_megatron.precision.emulation.read import Read
from nemotron3_megatron.precision.operands import Operand

ROWS = Operand(tensor="input", format="nvfp4", block=(1, 16))
ROTATED = replace(ROWS, hadamard=16)
SQUARE = Operand(tensor="weight", format="nvfp4", block=(16, 16))
GRADIENT = Operand(tensor="gradient", format="nvfp4", block=(1, 16), rounding="stochastic")
MXFP8 = Operand(tensor="input", format="mxfp8", block=(1, 32))

KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "normal": lambda x: x,
    "log-normal": lambda x: x * (2 * x.roll(1)).exp(),
    "subnormal": lambda x: x * 2.0**-131,
    "huge": lambda x: x * 1e37,
    "zeros": lambda x: x.sign() * 0.0,
    "mostly zeros": lambda x: x * (x > 1.5),
    "ties": lambda x: (x * 4).round() / 4,
    "infinite": lambda x: torch.where(x > 2.5, torch.inf, x),
    "nan": lambda x: torch.where(x > 2.5, torch.nan, x),
}


def assert_equal(found: tuple[Read | None, Read | None], expected: tuple[Read | None, Read | None]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None and theirs is not None:
            assert (ours.scale is None) == (theirs.scale is None)
            for a, b in ((ours.values, theirs.values), (ours.scale, theirs.scale)):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def every_kind(features: int, height: int, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """BF16 segments of ``height`` rows of each kind, an empty one before each, and the offsets."""
    generator = torch.Generator(device).manual_seed(1)
    noise = [torch.randn(height, features, generator=generator, device=device) for _ in KINDS]
    ends = torch.arange(len(KINDS) + 1, device=device).repeat_interleave(2)[:-1] * height
    return torch.cat([make(part) for make, part in zip(KINDS.values(), noise, strict=True)]).bfloat16(), ends.int()


class Draws:
    """BF16 numbers between E2M1's, whose blocks along rows and along columns all have scale 448: a six is in each."""

    def __init__(self, tokens: int, features: int, device: str = "cpu") -> None:
        generator = torch.Generator(device).manual_seed(6)
        self.x = (torch.rand(tokens, features, generator=generator, device=device) * 12 - 6).bfloat16()
        down, right = torch.arange(tokens, device=device), torch.arange(features, device=device)
        self._sixes = down[:, None] % 16 == right % 16
        self.x[self._sixes] = 6.0
        inputs = self.x[~self._sixes].float()
        self._step = torch.where(inputs.abs() < 2, 0.5, torch.where(inputs.abs() < 4, 1.0, 2.0))
        self._lower = (inputs / self._step).floor() * self._step
        self._share = (inputs - self._lower) / self._step

    def check(self, reads: list[Read]) -> None:
        """Only the neighbours; no bias in any tenth of the steps, for negative or positive numbers; no correlation
        between reads, nor between elements less than 16 apart in a row or a column.

        Bounds are 5 standard deviations, which one in 10^6 passes by chance; a bias, or a correlation, of 5 standard
        deviations is found with probability 1/2, of 7 with 0.98. Of a mean over n draws with the probability p to go
        up the standard deviation is sqrt(p (1 - p) / n) steps, of a correlation 1 / sqrt(n).
        """
        # Tensors as divisors, which leaves exact quotients exact on a GPU too.
        lower, step = 448 * self._lower, 448 * self._step
        ups = [(read.values[~self._sixes].float() - lower) / step for read in reads]
        p = self._share
        for up in ups:
            assert torch.isin(up, torch.tensor([0.0, 1.0], device=up.device)).all()
            assert (up[p == 0] == 0).all()
            for tenth in range(10):
                for chosen in (
                    ((p * 10).int() == tenth) & (self._lower < 0),
                    ((p * 10).int() == tenth) & (self._lower >= 0),
                ):
                    deviation = (p * (1 - p))[chosen].sum().sqrt()
                    assert (up - p)[chosen].sum().abs() < 5 * deviation, tenth
        random = (p > 0.05) & (p < 0.95)
        # Away from zero, so that elements that share a random number move alike whatever their signs.
        outwards = torch.where(self._lower < 0, -1.0, 1.0)
        unit = torch.stack([torch.where(random, outwards * (up - p) / (p * (1 - p)).sqrt(), 0.0) for up in ups])
        bound = 5 * float(random.sum()) ** 0.5
        assert (unit @ unit.T - (unit @ unit.T).diag().diag()).abs().max() < bound
        for one in unit:
            matrix = torch.zeros(self.x.shape, device=p.device)
            matrix[~self._sixes] = one
            for shift in range(1, 16):
                for dim in (0, 1):
                    assert (matrix * matrix.roll(shift, dim)).sum().abs() < bound, (shift, dim)
