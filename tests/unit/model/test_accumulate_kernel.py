"""Gradients of many experts added into their buffers by one kernel (run by Triton's interpreter), against a loop."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

from nemotron3_megatron.model.kernels.accumulate import add_evenly_spaced
from nemotron3_megatron.model.wgrad import spacing

EXPERTS, ROWS, COLUMNS = 5, 33, 70
"""2310 elements: more than one block of the kernel, and no multiple of it."""


def buffers(distance: int) -> tuple[Tensor, list[Tensor]]:
    """A whole buffer, and in it one of each expert, ``distance`` apart; padding between them."""
    size = ROWS * COLUMNS
    whole = torch.arange(EXPERTS * abs(distance), dtype=torch.float32)
    starts = [i * abs(distance) for i in range(EXPERTS)]
    order = starts if distance > 0 else starts[::-1]
    return whole, [whole[start : start + size].view(ROWS, COLUMNS) for start in order]


def added(distance: int, source: Tensor) -> Tensor:
    whole, views = buffers(distance)
    assert spacing(views) == distance
    add_evenly_spaced(views, distance, source)
    return whole


@pytest.mark.parametrize("distance", [2310, 2368, -2310, -2368])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_equals_a_loop(distance: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the padding between buffers keeps its values. Integers: float32 sums are exact."""
    source = torch.randint(-99, 99, (EXPERTS, ROWS, COLUMNS), generator=torch.Generator().manual_seed(1)).to(dtype)
    wanted, views = buffers(distance)
    for view, gradient in zip(views, source, strict=True):
        view.add_(gradient)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # read when Triton is imported: in a process of its own
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        assert torch.equal(process.submit(added, distance, source).result(), wanted)


def test_uneven_spacing_is_seen() -> None:
    whole = torch.zeros(100)
    pieces: Any = [whole[0:10], whole[10:20], whole[32:42]]
    assert spacing(pieces) is None
    assert spacing(pieces[:2]) == 10
    assert spacing(pieces[:1]) == 0
