"""Matrix products and memory of every GPU here, against its data sheet."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Literal

import torch

from nemotron3_megatron.accelerators import DataSheet, data_sheet
from nemotron3_megatron.platform.checks.kernel import Draw
from nemotron3_megatron.platform.checks.outcome import Measurement, Outcome, UnavailableError

LEAST = 0.5
"""Share of the data sheet's figure below which a GPU is not well: shared, throttled, a slice, or another model.
cuBLAS reaches about 0.8 of the BF16 figure at the power limit, a copy about 0.9 of the memory's."""

REPEATS = 10
_FP8_SINCE = (8, 9)
"""Compute capability of the first tensor cores with FP8."""


def bf16_product(device: torch.device, dtype: torch.dtype) -> Outcome:
    """Square products of normal numbers, which cost more power than zeros."""

    def measured(here: torch.device, sheet: DataSheet | None) -> Measurement:
        size = Draw(here, dtype).size(8192, 256)
        a, b = (Draw(here, torch.bfloat16).normal(size, size) for _ in range(2))
        seconds = median_seconds(lambda: torch.mm(a, b), here)
        return _rate(here, 2 * size**3 / seconds, "FLOP/s", sheet.bf16 if sheet else None)

    return _of_every(device, measured)


def fp8_product(device: torch.device, dtype: torch.dtype) -> Outcome:
    """The same of E4M3, with one scale a tensor, into BF16.

    Raises:
        UnavailableError: the device has no FP8 units.
    """
    if device.type == "cpu" or torch.cuda.get_device_capability(device) < _FP8_SINCE:
        raise UnavailableError("no FP8 units")

    def measured(here: torch.device, sheet: DataSheet | None) -> Measurement:
        size = 8192
        a, b = (Draw(here, torch.float8_e4m3fn).normal(size, size) for _ in range(2))
        one = torch.ones((), device=here)
        seconds = median_seconds(
            lambda: torch._scaled_mm(a, b.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True), here
        )
        return _rate(here, 2 * size**3 / seconds, "FLOP/s", sheet.fp8 if sheet else None)

    return _of_every(device, measured)


def memory(device: torch.device, dtype: torch.dtype) -> Outcome:
    """A copy within the device's memory, bytes read and bytes written."""

    def measured(here: torch.device, sheet: DataSheet | None) -> Measurement:
        size = Draw(here, dtype).size(2**30, 2**20)
        source, target = (torch.zeros(size, dtype=torch.uint8, device=here) for _ in range(2))
        seconds = median_seconds(lambda: target.copy_(source), here)
        return _rate(here, 2 * size / seconds, "B/s", sheet.memory_bandwidth if sheet else None)

    return _of_every(device, measured)


def median_seconds(call: Callable[[], object], device: torch.device) -> float:
    """Of REPEATS calls, each timed by itself after a few unmeasured ones."""
    for _ in range(3):
        call()
    return statistics.median(_timed(call, device))


def _timed(call: Callable[[], object], device: torch.device) -> Iterator[float]:
    for _ in range(REPEATS):
        if device.type == "cpu":
            begin = time.perf_counter()
            call()
            yield time.perf_counter() - begin
            continue
        with torch.cuda.device(device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            yield start.elapsed_time(end) / 1e3


def _rate(device: torch.device, value: float, unit: Literal["FLOP/s", "B/s"], peak: float | None) -> Measurement:
    return Measurement("CPU" if device.type == "cpu" else f"GPU {device.index}", value, unit, peak, LEAST)


def _of_every(device: torch.device, measured: Callable[[torch.device, DataSheet | None], Measurement]) -> Outcome:
    """On the CPU, or on each visible GPU in turn."""
    if device.type == "cpu":
        return Outcome(measurements=(measured(device, None),))
    found, note = [], ""
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        sheet = data_sheet(name)
        note = note if sheet else f"no data sheet of {name}: nothing to compare with"
        found.append(measured(torch.device("cuda", index), sheet))
        torch.cuda.empty_cache()
    return Outcome(measurements=tuple(found), note=note)
