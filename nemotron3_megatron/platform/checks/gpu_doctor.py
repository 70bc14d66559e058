"""``nemotron3 doctor --gpu``: every check on the GPUs of this machine, and one table."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform.checks.outcome import Comparison, Measurement, Result
from nemotron3_megatron.platform.checks.performing import perform_apart
from nemotron3_megatron.platform.checks.registry import CHECKS
from nemotron3_megatron.platform.doctor import find_devices
from nemotron3_megatron.platform.kernel_cache import use_kernel_cache

if TYPE_CHECKING:
    from rich.console import Console

_log = logging.getLogger(__name__)

_PREFIXES = (("P", 1e15), ("T", 1e12), ("G", 1e9))
_STYLES = {"pass": "green", "fail": "bold red", "skipped": "dim"}


def run_gpu_doctor(as_json: bool, width: int | None = None) -> int:
    """Check the GPUs, report on stdout and progress on stderr; returns the exit status (1: a check failed).

    Args:
        as_json: one JSON object in place of the table.
        width: columns of the table; None: the terminal's.

    Raises:
        UserError: there is no usable GPU.
    """
    devices, cuda = find_devices()
    if not devices:
        raise UserError("--gpu", where="command line", why=cuda, nearest="nemotron3 doctor")
    use_kernel_cache()
    results = []
    for result in perform_apart(CHECKS, torch.device("cuda", 0), torch.bfloat16):
        _log.info("%s: %s (%.1f s)", result.name, result.verdict, result.seconds)
        results.append(result)
    if as_json:
        sys.stdout.write(json.dumps(report(results, devices, cuda), indent=2) + "\n")
    else:
        from rich.console import Console

        render(results, devices, cuda, Console(width=width))
    return exit_status(results)


def exit_status(results: Sequence[Result]) -> int:
    """1 if a check failed; a skipped one is none."""
    return int(any(result.verdict == "fail" for result in results))


def report(results: Sequence[Result], devices: Sequence[str], cuda: str) -> dict[str, Any]:
    """All that was found, as JSON takes it: NaN and infinity by name."""
    return {
        "devices": list(devices),
        "cuda": cuda,
        "checks": [asdict(result, dict_factory=_plain) for result in results],
        "exit_status": exit_status(results),
    }


def _plain(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: str(x) if isinstance(x, float) and not math.isfinite(x) else x for name, x in pairs}


def render(results: Sequence[Result], devices: Sequence[str], cuda: str, console: Console) -> None:
    """The table and the verdict."""
    from rich.table import Table
    from rich.text import Text

    for label, value in (("Devices", "; ".join(devices)), ("CUDA", cuda)):
        console.print(Text.assemble((f"{label:<10}", "bold"), value))
    table = Table("check", "verdict", "found", "seconds", "remarks")
    for result in results:
        verdict = Text(result.verdict, _STYLES[result.verdict])
        remark = result.reason or result.outcome.note
        table.add_row(result.name, verdict, found(result), f"{result.seconds:.1f}", Text(remark))
    console.print(table)
    failed = [result.name for result in results if result.verdict == "fail"]
    if failed:
        more = "nemotron3 doctor --gpu --json has tracebacks and every number"
        console.print(Text(f"Not well: {', '.join(failed)} ({more})", "bold red"))
    else:
        console.print(Text("All that could be checked is well.", "bold green"))


def found(result: Result) -> str:
    """The comparison that is nearest to its bound or furthest beyond it, and every measurement."""
    comparisons, measurements = result.outcome.comparisons, result.outcome.measurements
    parts = [_compared(max(comparisons, key=_badness))] if comparisons else []
    return "\n".join(parts + [_measured(measurement) for measurement in measurements])


def _badness(comparison: Comparison) -> tuple[bool, float]:
    """Whether it failed, and by how much; NaN is the worst."""
    error = math.inf if math.isnan(comparison.error) else comparison.error
    return not comparison.passed, error / comparison.bound if comparison.bound else error


def _compared(comparison: Comparison) -> str:
    relation = "≤" if comparison.passed else "not ≤"
    return f"{comparison.what} {comparison.error:.1e} {relation} {comparison.bound:.1e}"


def _measured(measurement: Measurement) -> str:
    def number(value: float) -> str:
        prefix, size = next((each for each in _PREFIXES if value >= each[1]), ("M", 1e6))
        return f"{value / size:,.3g} {prefix}{measurement.unit}"

    share = f", {measurement.value / measurement.peak:.0%} of {number(measurement.peak)}" if measurement.peak else ""
    return f"{measurement.what} {number(measurement.value)}{share}"
