"""The doctor's table, its JSON and its exit status."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from nemotron3_megatron.cli import main
from nemotron3_megatron.platform.checks.gpu_doctor import exit_status, found, render, report
from nemotron3_megatron.platform.checks.outcome import Comparison, Measurement, Outcome, Result
from nemotron3_megatron.platform.checks.performing import perform
from nemotron3_megatron.platform.checks.registry import CHECKS

DEVICES, CUDA = ("NVIDIA H100 80GB HBM3, 80 GiB, sm_90",), "CUDA 13.0, 1 GPUs"
WELL = Result("linear", "pass", 1.25, Outcome((Comparison("y", 1e-3, 4e-3), Comparison("dx", 2e-3, 4e-3)), note="[a]"))
SPEED = Measurement("GPU 0", 798e12, "FLOP/s", 989.4e12, 0.5)
FAST = Result("BF16 product", "pass", 0.5, Outcome(measurements=(SPEED,)))
SKIPPED = Result("mixer", "skipped", 0.0, reason="mamba-ssm is not installed: make env-cuda")
OFF = Result("norm", "fail", 0.1, Outcome((Comparison("y", 9e-3, 4e-3), Comparison("dx", math.nan, 4e-3))))


def shown(*results: Result) -> str:
    out = io.StringIO()
    render(results, DEVICES, CUDA, Console(file=out, width=200))
    return out.getvalue()


def test_the_table_shows_the_worst_of_each_check() -> None:
    text = shown(WELL, FAST, SKIPPED)
    for part in (
        "NVIDIA H100 80GB HBM3",
        "dx 2.0e-03 ≤ 4.0e-03",
        "[a]",
        "GPU 0 798 TFLOP/s, 81% of 989 TFLOP/s",
        "mamba-ssm is not installed: make env-cuda",
        "All that could be checked is well.",
    ):
        assert part in text
    assert "dx nan not ≤ 4.0e-03" in shown(WELL, OFF)
    assert "Not well: norm (" in shown(WELL, OFF)


def test_bit_for_bit_comparisons_show_the_worst_too() -> None:
    outcome = Outcome((Comparison("rows", 0.0, 0.0), Comparison("columns", 0.25, 0.0), Comparison("z", 0.1, 0.2)))
    assert found(Result("NVFP4", "fail", 0.0, outcome)) == "columns 2.5e-01 not ≤ 0.0e+00"


def test_exit_status() -> None:
    assert exit_status([WELL, SKIPPED]) == 0
    assert exit_status([WELL, OFF]) == 1


def test_json_is_strict_and_complete() -> None:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = json.dumps(report([WELL, OFF, FAST], DEVICES, CUDA))
    whole = json.loads(text, parse_constant=refuse)
    assert whole["exit_status"] == 1
    assert whole["devices"] == list(DEVICES)
    assert [row["verdict"] for row in whole["checks"]] == ["pass", "fail", "pass"]
    assert whole["checks"][1]["outcome"]["comparisons"][1] == {"what": "dx", "error": "nan", "bound": 4e-3}


def test_speeds_below_half_the_data_sheet_fail() -> None:
    assert SPEED.passed
    assert not Measurement("GPU 0", 400e12, "FLOP/s", 989.4e12, 0.5).passed
    assert Measurement("GPU 0", 400e12, "FLOP/s", None, 0.5).passed


@pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")
def test_a_machine_without_a_gpu_is_told_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--gpu"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "error: --gpu (command line): torch was built" in captured.err
    assert "nearest legal: nemotron3 doctor" in captured.err
    assert main(["doctor", "--gpu", "fast=true"]) == 2


def test_every_check_answers_on_a_cpu() -> None:
    """Pass where there is a CPU implementation, else skipped with the reason; none breaks."""
    results = [perform(check, torch.device("cpu"), torch.bfloat16) for check in CHECKS]
    assert {result.verdict for result in results} == {"pass", "skipped"}
    assert all(result.reason for result in results if result.verdict == "skipped")
    passed = {result.name for result in results if result.verdict == "pass"}
    assert passed >= {"squared ReLU", "vocabulary loss", "memory bandwidth", "BF16 product"}
    assert "CPU" in shown(*results)
