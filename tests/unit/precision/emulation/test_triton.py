"""The Triton kernels on a CPU, in Triton's interpreter, against the torch reference. tests/gpu has them on a GPU."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron3_megatron.precision.emulation import reference, triton
from nemotron3_megatron.precision.emulation.read import Read
from nemotron3_megatron.precision.operands import Operand
from tests.oracles.reads import GRADIENT, MXFP8, ROTATED, ROWS, SQUARE, Draws, assert_equal, every_kind

ReadFunction = Callable[..., tuple[Read | None, Read | None]]


@pytest.fixture(scope="module")
def read() -> Iterator[ReadFunction]:
    """``triton.read`` in a process of its own: whether Triton interprets is settled when it is imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _repair_interpreter) as process:
            yield lambda *args, **kwargs: process.submit(triton.read, *args, **kwargs).result()


def _repair_interpreter() -> None:
    """Make Triton 3.6's interpreter round to bfloat16 as GPUs do, where it truncates (triton/runtime/interpreter.py,
    ``_convert_float``), and ignore NaN in plain minima and maxima (``create_minnumf``, ``create_maxnumf``)."""
    from triton.runtime import interpreter

    bits = {16: (torch.bfloat16, np.int16), 32: (torch.float32, np.int32)}

    def convert(x: np.ndarray, source: object, target: object, rounding: object) -> np.ndarray:
        (from_type, from_bits), (to_type, to_bits) = (bits[t.primitive_bitwidth] for t in (source, target))
        converted = torch.from_numpy(np.ascontiguousarray(x).view(from_bits)).view(from_type).to(to_type)
        return converted.view(getattr(torch, np.dtype(to_bits).name)).numpy().reshape(x.shape)

    interpreter._convert_float = convert
    for name, function in (("create_minnumf", np.fmin), ("create_maxnumf", np.fmax)):
        setattr(interpreter.InterpreterBuilder, name, lambda self, a, b, f=function: self.binary_op(a, b, f))
    np.seterr(all="ignore")


@pytest.mark.parametrize(
    ("rows", "columns", "fold"),
    [
        (ROWS, ROTATED, False),
        (ROWS, ROTATED, True),
        (ROWS, ROWS, False),
        (None, ROTATED, False),
        (SQUARE, None, False),
        (SQUARE, None, True),
        (MXFP8, MXFP8, False),
        (None, MXFP8, False),
    ],
)
def test_any_numbers_in_segments(read: ReadFunction, rows: Operand | None, columns: Operand | None, fold: bool) -> None:
    x, offsets = every_kind(80 if rows != MXFP8 and columns != MXFP8 else 96, 32)
    found = read(x, rows, columns, offsets=offsets, fold=fold)
    assert_equal(found, reference.read(x, rows, columns, offsets=offsets, fold=fold))


@pytest.mark.parametrize("shape", [(16, 16), (48, 272), (32, 608), (0, 64)])
def test_shapes(read: ReadFunction, shape: tuple[int, int]) -> None:
    """Beside the tiles' edges, and more than one chunk in a pass."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    assert_equal(read(x, ROWS, ROTATED), reference.read(x, ROWS, ROTATED))
    assert_equal(read(x, SQUARE, None), reference.read(x, SQUARE, None))


def test_float32(read: ReadFunction) -> None:
    """Without rotation, whose sums are then rounded in an order of their own."""
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(3))
    assert_equal(read(x, ROWS, ROWS, fold=True), reference.read(x, ROWS, ROWS, fold=True))
    assert_equal(read(x, MXFP8, MXFP8), reference.read(x, MXFP8, MXFP8))


def test_rows_alone_are_of_any_number(read: ReadFunction) -> None:
    x = torch.randn(37, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    for operand in (ROWS, MXFP8):
        assert_equal(read(x, operand, None), reference.read(x, operand, None))


def test_many_segments(read: ReadFunction) -> None:
    x = torch.randn(64, 32, generator=torch.Generator().manual_seed(5)).bfloat16() * torch.arange(1, 65)[:, None]
    offsets = torch.zeros(513, dtype=torch.int32)
    offsets[3:], offsets[100:], offsets[511:] = 16, 48, 64
    assert_equal(read(x, ROWS, ROTATED, offsets=offsets), reference.read(x, ROWS, ROTATED, offsets=offsets))


def test_stochastic_rounding(read: ReadFunction) -> None:
    """8600 draws, 430 in a tenth and sign: a bias of 7 * 0.5 / sqrt(430) = 0.17 steps is found. tests/gpu has more."""
    draws = Draws(64, 144)
    once, again, other = (
        read(draws.x, GRADIENT, GRADIENT, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert_equal(once, again)
    draws.check([part for part in (*once, *other) if part is not None])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: triton.read(x.half(), ROWS, None), "float16"),
        (lambda x: triton.read(x.T, ROWS, None), "contiguous"),
        (lambda x: triton.read(x, ROWS, MXFP8), r"one quantised format .* not \['mxfp8', 'nvfp4'\]"),
        (lambda x: triton.read(x, replace(ROWS, format="bf16"), None), r"one quantised format .* not \['bf16'\]"),
        (lambda x: triton.read(x, None, SQUARE), "no kernel"),
        (lambda x: triton.read(x, ROTATED, None), "rotations lie along columns"),
        (lambda x: triton.read(x, ROWS, ROWS), r"blocks of \(16, 1\) do not divide shape \(40, 64\)"),
        (lambda x: triton.read(x[:, :24].contiguous(), ROWS, None), r"blocks of \(1, 16\) do not divide"),
        (lambda x: triton.read(x, None, MXFP8), r"blocks of \(32, 1\) do not divide"),
        (lambda x: triton.read(x, GRADIENT, None), "needs a generator"),
        (lambda x: triton.read(x, ROWS, None, offsets=torch.tensor([0, 40])), "offsets are int32"),
    ],
)
def test_refuses(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(40, 64))


def test_reading_on_a_cpu_needs_no_triton() -> None:
    program = """if True:
        import sys
        sys.modules["triton"] = None
        import torch
        from nemotron3_megatron.precision.emulation.read import read
        from nemotron3_megatron.precision.operands import Operand
        read(torch.ones(16, 16), Operand(tensor="input", format="nvfp4", block=(1, 16)), None)
    """
    subprocess.run([sys.executable, "-c", program], check=True)
