"""What the doctor asks of the emulation kernels, asked of the torch reference."""

from __future__ import annotations

from dataclasses import replace

import torch

from nemotron3_megatron.platform.checks.kernel import Draw
from nemotron3_megatron.platform.checks.quantising import differing, stochastic_mean
from nemotron3_megatron.precision.emulation.read import read
from nemotron3_megatron.precision.operands import gemms
from nemotron3_megatron.precision.policy import Nvfp4

NVFP4 = gemms("nvfp4", Nvfp4())


def source() -> torch.Tensor:
    return Draw(torch.device("cpu"), torch.bfloat16).normal(96, 160)


def test_a_single_different_number_is_found() -> None:
    x = source()
    found, expected = (read(x, NVFP4.fprop[0], NVFP4.wgrad[1]) for _ in range(2))
    assert differing(found, expected) == 0
    assert found[1] is not None
    found[1].values[7, 3] += 1
    assert differing(found, expected) == 1 / (2 * (x.numel() + 1))
    found[1].values[7, 3] = torch.nan
    assert differing(found, expected) > 0


def test_the_mean_of_stochastic_reads() -> None:
    gradient = NVFP4.dgrad[0]
    assert gradient.rounding == "stochastic"
    assert stochastic_mean(source(), gradient).passed
    assert not stochastic_mean(source(), replace(gradient, rounding="nearest")).passed
