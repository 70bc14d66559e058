"""Checks that fail, crash or hang cost themselves only."""

from __future__ import annotations

import os
import pickle
import signal
import time

import pytest
import torch

from nemotron3_megatron.platform.checks.outcome import Check, Comparison, Outcome, UnavailableError
from nemotron3_megatron.platform.checks.performing import perform, perform_apart
from nemotron3_megatron.platform.checks.registry import CHECKS

CPU = torch.device("cpu")


def well(device: torch.device, dtype: torch.dtype) -> Outcome:
    return Outcome((Comparison("y", 1e-3, 2e-3),), note=f"{device.type} {dtype} {os.getpid()}")


def off(device: torch.device, dtype: torch.dtype) -> Outcome:
    return Outcome((Comparison("y", 1e-3, 2e-3), Comparison("dx", 3e-3, 2e-3)))


def lacks(device: torch.device, dtype: torch.dtype) -> Outcome:
    raise UnavailableError("no FP8 units")


def breaks(device: torch.device, dtype: torch.dtype) -> Outcome:
    raise ValueError("\nbad stride\nmore")


def crashes(device: torch.device, dtype: torch.dtype) -> Outcome:
    os.kill(os.getpid(), signal.SIGSEGV)
    raise AssertionError("unreachable")


def leaves(device: torch.device, dtype: torch.dtype) -> Outcome:
    os._exit(3)


def hangs(device: torch.device, dtype: torch.dtype) -> Outcome:
    time.sleep(600)
    raise AssertionError("unreachable")


def nothing(device: torch.device, dtype: torch.dtype) -> Outcome:
    return Outcome()


@pytest.mark.parametrize(
    ("check", "verdict", "reason"),
    [
        (well, "pass", ""),
        (off, "fail", ""),
        (nothing, "fail", ""),
        (lacks, "skipped", "no FP8 units"),
        (breaks, "fail", "ValueError: bad stride"),
    ],
)
def test_verdicts(check: object, verdict: str, reason: str) -> None:
    result = perform(Check("it", check), CPU, torch.bfloat16)  # type: ignore[arg-type]
    assert (result.name, result.verdict, result.reason) == ("it", verdict, reason)
    assert ("in breaks" in result.traceback) == (check is breaks)
    assert 0 <= result.seconds < 5


def test_those_after_a_crash_are_made_all_the_same() -> None:
    checks = [Check(run.__name__, run) for run in (well, crashes, breaks, off, leaves, well)]
    results = list(perform_apart(checks, CPU, torch.bfloat16))
    assert [(result.name, result.verdict) for result in results] == [
        ("well", "pass"),
        ("crashes", "fail"),
        ("breaks", "fail"),
        ("off", "fail"),
        ("leaves", "fail"),
        ("well", "pass"),
    ]
    assert results[1].reason == "its process ended by SIGSEGV"
    assert results[4].reason == "its process exited with 3"
    processes = {results[i].outcome.note for i in (0, 5)} | {f"cpu torch.bfloat16 {os.getpid()}"}
    assert len(processes) == 3, "each crash costs a process, and none of them is this one"


def test_a_check_that_hangs_is_ended() -> None:
    """With a limit that may end before the check starts: no answer either way."""
    started = time.monotonic()
    results = list(perform_apart([Check("hangs", hangs)], CPU, torch.bfloat16, limit_s=2))
    assert [(result.verdict, result.reason) for result in results] == [("fail", "no answer in 2 s")]
    assert time.monotonic() - started < 60


def test_all_checks_reach_another_process() -> None:
    assert [check.name for check in pickle.loads(pickle.dumps(CHECKS))] == [check.name for check in CHECKS]
    assert len({check.name for check in CHECKS}) == len(CHECKS)
