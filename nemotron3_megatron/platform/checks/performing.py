"""Checks in a process of their own: a crash, a hang or a broken CUDA context costs one check, not those after it."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

import torch

from nemotron3_megatron.logs import start_logging
from nemotron3_megatron.platform.checks.outcome import Check, Outcome, Result, UnavailableError, Verdict
from nemotron3_megatron.platform.kernel_cache import announce_compilation

LIMIT_S = 300.0
"""A check without an answer for so long hangs; the first tuning of the Mamba-2 kernels takes about two minutes."""


def perform(check: Check, device: torch.device, dtype: torch.dtype) -> Result:
    """Run one check here."""
    started = time.perf_counter()

    def result(verdict: Verdict, reason: str = "", trace: str = "", outcome: Outcome | None = None) -> Result:
        return Result(check.name, verdict, time.perf_counter() - started, outcome or Outcome(), reason, trace)

    try:
        outcome = check.run(device, dtype)
    except UnavailableError as error:
        return result("skipped", str(error))
    except Exception as error:  # whatever a kernel's library raises is the finding
        first = str(error).strip().partition("\n")[0]
        return result("fail", f"{type(error).__name__}: {first}", traceback.format_exc())
    return result("pass" if outcome.passed else "fail", outcome=outcome)


def perform_apart(
    checks: Sequence[Check], device: torch.device, dtype: torch.dtype, limit_s: float = LIMIT_S
) -> Iterator[Result]:
    """Run checks in order in a new process, and those left in another one where that ended.

    Args:
        checks: picklable.
        device: for all of them.
        dtype: of parameters and activations.
        limit_s: longest time without an answer.
    """
    left = list(checks)
    while left:
        with _worker(left, device, dtype) as (process, connection):
            usable = True
            while left and usable:
                began = time.perf_counter()
                answer = _receive(connection, limit_s)
                check = left.pop(0)
                if answer is None:
                    why = _cause(process, limit_s)
                    answer = Result(check.name, "fail", time.perf_counter() - began, reason=why), False
                result, usable = answer
                yield result


@contextmanager
def _worker(
    checks: Sequence[Check], device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[SpawnProcess, Connection]]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(theirs, checks, device, dtype))
    process.start()
    theirs.close()
    try:
        yield process, mine
    finally:
        mine.close()
        process.join(5)
        process.kill()
        process.join()


def _work(connection: Connection, checks: Sequence[Check], device: torch.device, dtype: torch.dtype) -> None:
    start_logging()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        announce_compilation()
    for check in checks:
        result = perform(check, device, dtype)
        usable = result.verdict != "fail" or _is_usable(device)
        connection.send((result, usable))
        if not usable:
            return
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _is_usable(device: torch.device) -> bool:
    """Whether kernels still run: after an illegal access nothing does in this process."""
    if device.type == "cpu":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def _receive(connection: Connection, limit_s: float) -> tuple[Result, bool] | None:
    """A result, and whether the process can go on; None: it ended, or took too long."""
    try:
        received: tuple[Result, bool] | None = connection.recv() if connection.poll(limit_s) else None
    except EOFError:
        return None
    return received


def _cause(process: SpawnProcess, limit_s: float) -> str:
    process.join(1)
    code = process.exitcode
    if code is None:
        process.kill()
        return f"no answer in {limit_s:,.0f} s"
    return f"its process ended by {signal.Signals(-code).name}" if code < 0 else f"its process exited with {code}"
