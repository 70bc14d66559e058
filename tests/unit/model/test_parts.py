"""Layers that work in parts compute what they compute whole."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nemotron3_megatron.model.mamba2 import mamba2_mix
from nemotron3_megatron.model.mamba_parts import MixWeights, mix_in_parts
from nemotron3_megatron.model.parts import LARGEST_INDEX, scan_parts, tokens_at_a_time

HEADS, HEAD_DIM, GROUPS, STATE, LENGTH = 8, 4, 4, 3, 21
INNER, GROUP_WIDTH = HEADS * HEAD_DIM, GROUPS * STATE


def _leaves(skip_by_channel: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = [
        (2, LENGTH, 2 * INNER + 2 * GROUP_WIDTH + HEADS),
        (INNER + 2 * GROUP_WIDTH, 4),
        (INNER + 2 * GROUP_WIDTH,),
        (HEADS,),
        (HEADS,),
        (HEADS, HEAD_DIM) if skip_by_channel else (HEADS,),
    ]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


def _mixed(leaves: list[Tensor], parts: int, bias: bool) -> Tensor:
    documents = (torch.arange(LENGTH) // 8).repeat(2, 1)
    zxbcdt, conv_weight, conv_bias, dt_bias, a_log, skip = leaves

    def mix(columns: Tensor, own: MixWeights) -> Tensor:
        return mamba2_mix(columns, *own, head_dim=HEAD_DIM, num_groups=GROUPS // parts, chunk_size=5, seq_idx=documents)

    weights = MixWeights(conv_weight, conv_bias if bias else None, dt_bias, -a_log.exp(), skip)
    return mix_in_parts(mix, zxbcdt, weights, parts, HEAD_DIM)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("skip_by_channel", [True, False])
@pytest.mark.parametrize("parts", [2, 4])
def test_groups_mixed_in_parts(parts: int, skip_by_channel: bool, bias: bool) -> None:
    """float64; a gradient sums 2 * 21 positions of products of a few numbers near 1: 1e-12 is generous."""
    leaves = [leaf for leaf in _leaves(skip_by_channel) if bias or leaf.shape != (INNER + 2 * GROUP_WIDTH,)]
    given = leaves if bias else [*leaves[:2], torch.empty(0), *leaves[2:]]
    whole, found = _mixed(given, 1, bias), _mixed(given, parts, bias)
    torch.testing.assert_close(found, whole, rtol=1e-12, atol=1e-12)
    gradients = [torch.autograd.grad(each.square().sum(), leaves) for each in (whole, found)]
    for expected, mine in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-12, atol=1e-12)


def test_scan_goes_in_as_many_parts_as_indices_need() -> None:
    """Nano (64 heads of 64, 8 groups, state 128): 10,304 values a token."""
    nano = {"width": 10_304, "inner": 4_096, "state": 128, "groups": 8, "chunk_size": 128}
    assert [scan_parts(length, **nano) for length in (8_192, 208_412, 208_413, 524_288, 1_048_576)] == [1, 1, 2, 4, 8]
    assert 208_412 * 10_304 <= LARGEST_INDEX < 208_413 * 10_304
    assert scan_parts(1_048_576, 1_288, 512, 128, 1, 128) == 1  # a rank of cp = 8
    # A chunk's state outgrows its positions: 1,024 * 4,096 / 32 numbers a position.
    assert scan_parts(16_000, 10_304, 4_096, 1_024, 8, 32) == 1
    assert scan_parts(32_768, 10_304, 4_096, 1_024, 8, 32) == 4
    with pytest.raises(ValueError, match="more context or tensor parallelism"):
        scan_parts(4_194_304, **nano)


def test_tokens_go_in_equal_parts() -> None:
    assert tokens_at_a_time(100, 10, 1000) == 100
    assert tokens_at_a_time(101, 10, 1000) == 51
    assert tokens_at_a_time(7, 1000, 100) == 1
