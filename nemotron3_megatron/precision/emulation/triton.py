"""``read`` on CUDA: Triton kernels, equal bit for bit to the torch reference where rounding is to nearest.

NVFP4 takes two launches (and a fill of 8 bytes a segment), the first for the amax; MXFP8 takes one. A launch reads the
source once and writes each direction once, whatever the number of segments, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from nemotron3_megatron.precision.emulation.kernels import mxfp8, nvfp4
from nemotron3_megatron.precision.emulation.read import Read
from nemotron3_megatron.precision.operands import Operand


@dataclass(frozen=True, slots=True)
class Tile:
    """How a kernel is launched."""

    blocks: int
    """Blocks a program takes in a row."""
    warps: int


# The fastest of a dozen each for 8192x4096 on an H100 (benchmarks/quantize.py shows what they reach).
AMAX = Tile(blocks=16, warps=4)
NVFP4 = Tile(blocks=4, warps=1)
MXFP8 = Tile(blocks=1, warps=1)
AMAX_PARTS = 8
"""Programs that share 16 rows in the first pass: enough to fill the device, few atomics."""


def read(
    x: Tensor,
    rows: Operand | None,
    columns: Operand | None,
    *,
    offsets: Tensor | None = None,
    generator: torch.Generator | None = None,
    fold: bool = False,
) -> tuple[Read | None, Read | None]:
    """See :func:`nemotron3_megatron.precision.emulation.read.read`.

    Further raises ValueError for operands of two formats, and for a layout or type that the kernels do not take.
    """
    formats = {operand.format for operand in (rows, columns) if operand is not None}
    if not formats:
        return None, None
    if formats not in ({"nvfp4"}, {"mxfp8"}):
        raise ValueError(f"one quantised format for both directions, not {sorted(formats)}")
    _check(x, offsets)
    _check_blocks(x, rows, transposed=False)
    _check_blocks(x, columns, transposed=True)
    if formats == {"mxfp8"}:
        return _mxfp8(x, rows is not None, columns is not None)
    return _nvfp4(x, rows, columns, offsets, generator, fold)


def _nvfp4(
    x: Tensor,
    rows: Operand | None,
    columns: Operand | None,
    offsets: Tensor | None,
    generator: torch.Generator | None,
    fold: bool,
) -> tuple[Read | None, Read | None]:
    tokens, features = x.shape
    segments = 1 if offsets is None else len(offsets) - 1
    padded = triton.next_power_of_2(segments)
    rotated = columns is not None and columns.hadamard is not None
    stochastic = [operand is not None and operand.rounding == "stochastic" for operand in (rows, columns)]
    seed, counter = _random_state(generator) if any(stochastic) else (0, 0)
    groups = triton.cdiv(tokens, 16)

    amax = torch.zeros(2, segments, dtype=torch.int32, device=x.device)
    nvfp4.amax_kernel[(max(1, groups * AMAX_PARTS),)](
        x, offsets, amax, tokens, features, segments,
        PLAIN=rows is not None or not rotated, ROTATED=rotated, PARTS=AMAX_PARTS, BLOCKS=AMAX.blocks, PADDED=padded,
        num_warps=AMAX.warps, enable_fp_fusion=False,
    )  # fmt: skip
    values = [None if operand is None else torch.empty_like(x) for operand in (rows, columns)]
    scales = None if fold else torch.empty(2, segments, dtype=torch.float32, device=x.device)
    nvfp4.quantise_kernel[(max(1, groups * triton.cdiv(features, 16 * NVFP4.blocks)),)](
        x, offsets, amax, *values, scales, seed, counter, tokens, features, segments,
        SQUARE=rows is not None and rows.block == (16, 16), HADAMARD=rotated,
        STOCHASTIC_ROWS=stochastic[0], STOCHASTIC_COLUMNS=stochastic[1], BLOCKS=NVFP4.blocks, PADDED=padded,
        num_warps=NVFP4.warps, enable_fp_fusion=False,
    )  # fmt: skip
    row_values, column_values = values
    row_scale, column_scale = (None, None) if scales is None else scales.unbind()
    return _read(row_values, row_scale), _read(column_values, column_scale)


def _mxfp8(x: Tensor, rows: bool, columns: bool) -> tuple[Read | None, Read | None]:
    tokens, features = x.shape
    row_values, column_values = (torch.empty_like(x) if wanted else None for wanted in (rows, columns))
    grid = triton.cdiv(tokens, 32) * triton.cdiv(features, 32 * MXFP8.blocks)
    if grid:
        mxfp8.quantise_kernel[(grid,)](
            x, row_values, column_values, tokens, features,
            BLOCKS=MXFP8.blocks, num_warps=MXFP8.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return _read(row_values, None), _read(column_values, None)


def _read(values: Tensor | None, scale: Tensor | None) -> Read | None:
    return None if values is None else Read(values, scale)


def _random_state(generator: torch.Generator | None) -> tuple[int, int]:
    """Key, and the first of two counters of Philox (four words each), which are taken from the generator."""
    if generator is None:
        raise ValueError("stochastic rounding needs a generator")
    if generator.device.type == "cpu":
        # Triton's interpreter. A CPU generator has no Philox state.
        return int(torch.randint(2**62, (), generator=generator)), 0
    offset = generator.get_offset()
    generator.set_offset(offset + 8)
    return generator.initial_seed(), offset // 4


def _check(x: Tensor, offsets: Tensor | None) -> None:
    if x.ndim != 2 or not x.is_contiguous() or x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"a contiguous matrix of bfloat16 or float32, not {x.dtype} {(*x.shape,)} {x.stride()}")
    if offsets is not None and (offsets.dtype != torch.int32 or offsets.device != x.device or offsets.ndim != 1):
        raise ValueError(
            f"offsets are int32 on {x.device}, not {offsets.dtype} {(*offsets.shape,)} on {offsets.device}"
        )


def _check_blocks(x: Tensor, operand: Operand | None, *, transposed: bool) -> None:
    if operand is None:
        return
    shapes = ((1, 32),) if operand.format == "mxfp8" else ((1, 16),) if transposed else ((1, 16), (16, 16))
    if operand.block is None or operand.block not in shapes:
        raise ValueError(f"no kernel for {operand} along {'columns' if transposed else 'rows'}")
    if operand.hadamard and not transposed:
        raise ValueError("rotations lie along columns: wgrad is the only GEMM with rotated operands")
    height, width = reversed(operand.block) if transposed else operand.block
    if x.shape[0] % height or x.shape[1] % width:
        raise ValueError(f"{operand.format} blocks of ({height}, {width}) do not divide shape {(*x.shape,)}")
