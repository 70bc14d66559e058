"""Operands as a GEMM reads them: quantised, then dequantised, in the layout they came in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from nemotron3_megatron.precision.operands import Operand


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """What a quantised operand holds: ``values * scale``.

    Block-scaled values are apart from the tensor's scale because a tensor core reads codes and block scales, and
    applies the tensors' scales to the sum (cuBLAS's alpha). A code times its E4M3 scale has at most 6 significant
    bits, so that BF16 holds it exactly.
    """

    values: Tensor
    """(T, K), type of the source. Code times block scale, or the whole value where ``scale`` is None."""
    scale: Tensor | None
    """(S,) float32, one a segment: amax * (1 / 2688) of NVFP4. None: 1."""


def read(
    x: Tensor,
    rows: Operand | None,
    columns: Operand | None,
    *,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    fold: bool = False,
) -> tuple[Read | None, Read | None]:
    """Quantise a matrix along its rows, its columns, or both, each from the source.

    Args:
        x: (T, K) contiguous, bfloat16 or float32.
        rows: operand whose blocks lie along K; a weight of 16x16 blocks serves both directions. None: not wanted.
        columns: operand whose blocks (and rotation) lie along T. None: not wanted.
        offsets: (S + 1,) int32, ascending from 0 to T: rows ``offsets[i]`` to ``offsets[i + 1]`` are a segment (an
            expert's tokens), with an amax of its own; each a whole number of blocks, some may be empty.
        generator: on ``x``'s device, drawn from for stochastic rounding.
        fold: multiply the tensor's scale into the values, for GEMMs that take plain tensors; they are then rounded
            to ``x``'s type, within half a unit in the last place.

    Returns:
        The operand along rows and the one along columns, both in the layout of ``x``.

    Raises:
        ValueError: T or K is not a whole number of blocks.
    """
    if x.is_cuda:
        from nemotron3_megatron.precision.emulation.triton import read as implementation
    else:
        from nemotron3_megatron.precision.emulation.reference import read as implementation
    return implementation(x, rows, columns, offsets=offsets, generator=generator, fold=fold)


def default_generator(device: torch.device) -> torch.Generator:
    """The device's own generator, whose state checkpoints hold."""
    if device.type == "cuda":
        return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return torch.default_generator


def segment_offsets(counts: Sequence[int], device: torch.device) -> Tensor:
    """``offsets`` of segments of ``counts`` rows."""
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32).to(device, non_blocking=True)
