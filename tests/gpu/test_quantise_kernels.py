"""The Triton kernels on a GPU: equal to the torch reference bit by bit, and stochastic rounding in distribution."""

from __future__ import annotations

import math

import pytest
import torch

from nemotron3_megatron.precision.emulation import reference
from nemotron3_megatron.precision.emulation.read import read
from nemotron3_megatron.precision.operands import Operand
from tests.oracles.reads import GRADIENT, MXFP8, ROTATED, ROWS, SQUARE, Draws, assert_equal, every_kind

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

PAIRS = [(ROWS, ROTATED), (ROWS, ROWS), (ROWS, None), (None, ROTATED), (SQUARE, None), (MXFP8, MXFP8), (None, MXFP8)]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(("rows", "columns"), PAIRS)
def test_any_numbers_in_segments(rows: Operand | None, columns: Operand | None, fold: bool) -> None:
    """Sums of the log-normal kind span more than 12 binades in one block of 10^5 and could then differ: not with this
    seed."""
    for features, height in ((96, 32), (2688, 512)):
        x, offsets = every_kind(features, height, "cuda")
        expected = reference.read(x, rows, columns, offsets=offsets, fold=fold)
        assert_equal(read(x, rows, columns, offsets=offsets, fold=fold), expected)


@pytest.mark.parametrize("shape", [(32, 32), (320, 1856), (4096, 10304), (2688, 18560)])
@pytest.mark.parametrize(("rows", "columns"), PAIRS)
def test_shapes(rows: Operand | None, columns: Operand | None, shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator("cuda").manual_seed(2), device="cuda").bfloat16()
    assert_equal(read(x, rows, columns), reference.read(x, rows, columns))


def test_float32() -> None:
    x = torch.randn(640, 960, generator=torch.Generator("cuda").manual_seed(3), device="cuda")
    for rows, columns in ((ROWS, ROWS), (SQUARE, None), (MXFP8, MXFP8)):
        assert_equal(read(x, rows, columns, fold=True), reference.read(x, rows, columns, fold=True))


def test_many_experts() -> None:
    """512 of them, many empty."""
    generator = torch.Generator().manual_seed(4)
    counts = torch.randint(0, 4, (512,), generator=generator) * 32
    offsets = torch.cat([torch.zeros(1), counts.cumsum(0)]).int().cuda()
    x = torch.randn(int(counts.sum()), 1856, generator=generator).cuda().bfloat16()
    for rows, columns in ((ROWS, ROTATED), (MXFP8, MXFP8)):
        expected = reference.read(x, rows, columns, offsets=offsets)
        assert_equal(read(x, rows, columns, offsets=offsets), expected)


def test_more_than_2_to_the_31_elements() -> None:
    """Zeros but for the last rows, which then have what they would have alone. Needs 15 GiB."""
    features = 32768
    x = torch.zeros(2**16 + 32, features, dtype=torch.bfloat16, device="cuda")
    x[-32:] = torch.randn(32, features, generator=torch.Generator("cuda").manual_seed(5), device="cuda")
    for rows, columns in ((ROWS, ROTATED), (MXFP8, MXFP8)):
        expected = reference.read(x[-32:], rows, columns)
        for ours, theirs in zip(read(x, rows, columns), expected, strict=True):
            assert ours is not None
            assert theirs is not None
            assert torch.equal(ours.values[-32:], theirs.values)
            assert not ours.values[:-32].any()


def test_stochastic_rounding() -> None:
    """15.7 million draws, 800,000 in a tenth and sign: a bias of 7 * 0.5 / sqrt(800,000) = 0.004 steps is found."""
    draws, generator = Draws(4096, 4096, "cuda"), torch.Generator("cuda").manual_seed(7)
    start = generator.get_state()
    first, second = (read(draws.x, GRADIENT, GRADIENT, generator=generator) for _ in range(2))
    draws.check([part for part in (*first, *second) if part is not None])
    generator.set_state(start)
    assert_equal(read(draws.x, GRADIENT, GRADIENT, generator=generator), first)


def test_stochastic_rounding_uses_up_the_generator() -> None:
    """Random numbers that others draw later from the same generator are not the ones used here."""
    x = torch.randn(64, 64, device="cuda").bfloat16()
    default = torch.cuda.default_generators[torch.cuda.current_device()]
    before = default.get_offset()
    read(x, GRADIENT, GRADIENT, generator=default)
    assert default.get_offset() == before + 8
    read(x, ROWS, ROTATED, generator=default)
    assert default.get_offset() == before + 8


def test_nothing_waits_for_the_device() -> None:
    x, offsets = every_kind(96, 32, "cuda")
    generator = torch.Generator("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        for rows, columns in ((ROWS, ROTATED), (GRADIENT, GRADIENT), (MXFP8, MXFP8)):
            read(x, rows, columns, offsets=offsets, generator=generator)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_infinity_and_nan_stay_visible() -> None:
    x = torch.randn(64, 64, device="cuda").bfloat16()
    x[3, 5] = math.nan
    for part in read(x, ROWS, ROTATED):
        assert part is not None
        assert part.values.isnan().all()
