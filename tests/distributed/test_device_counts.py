"""Which runs keep their experts' token counts on the GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from tiny import tiny_run

import nemotron3_megatron  # noqa: F401  (before any Megatron-Core import: it installs the CPU platform)
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.experts import keeps_counts_on_device
from nemotron3_megatron.model.builder import check_supported
from nemotron3_megatron.platform import select
from nemotron3_megatron.precision.policy import Format


@pytest.mark.parametrize(
    ("number_format", "native", "expected"),
    [
        ("bf16", False, True),
        ("nvfp4", False, True),
        ("mxfp8", False, True),
        ("nvfp4", True, False),  # TE's grouped GEMM takes counts from the CPU
    ],
)
def test_formats_and_backends(number_format: Format, native: bool, expected: bool) -> None:
    run = tiny_run(1, dtype="bf16")
    run = replace(run, precision=replace(run.precision, default=number_format))
    assert keeps_counts_on_device(run, native=native) is expected


@pytest.mark.parametrize("layout", [{}, {"ep": 2}, {"tp": 2, "ep": 2}, {"tp": 2}])
def test_layouts(layout: dict[str, int]) -> None:
    assert keeps_counts_on_device(tiny_run(2, dtype="bf16", **layout), native=False) is True


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "fp32"},  # torch's grouped product on a GPU is BF16
        {"recompute": "selective", "recompute_modules": ("moe_act",)},
    ],
)
def test_runs_that_cannot(options: dict[str, Any]) -> None:
    assert keeps_counts_on_device(tiny_run(2, **{"dtype": "bf16"} | options), native=False) is False


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"recompute": "selective", "recompute_modules": ("moe_act", "moe")}, "moe_act"),
        ({"recompute": "selective", "recompute_modules": ("layernorm", "moe")}, "layernorm"),
        ({"router_fusion": True}, "model.moe_router_fusion=true"),
    ],
)
def test_the_torch_spec_refuses_what_needs_transformer_engine(options: dict[str, Any], what: str) -> None:
    run = tiny_run(1, **options)
    with pytest.raises(UserError, match=what):
        check_supported(run, select("cpu"), "torch")
    check_supported(run, select("cpu"), "te")
