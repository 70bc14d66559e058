"""Choosing a platform, what it imposes on Megatron-Core, and what it measures."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Literal

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.platform import Platform, cpu, select
from nemotron3_megatron.platform.base import Spec, core_count
from nemotron3_megatron.platform.cpu import CpuPlatform
from nemotron3_megatron.platform.cuda import CudaPlatform, missing_modules

without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no CUDA")


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@without_cuda
@pytest.mark.parametrize("device", ["auto", "cpu"])
def test_cpu_is_selected_without_cuda(device: Literal["auto", "cpu"]) -> None:
    platform: Platform = select(device)
    assert (platform.name, platform.device, platform.collective_backend) == ("cpu", torch.device("cpu"), "gloo")
    assert platform.default_spec == "torch"


@without_cuda
def test_cuda_is_refused_without_a_gpu() -> None:
    with pytest.raises(UserError, match=r"device=cuda: torch .*\n  nearest legal: device=cpu"):
        select("cuda")


def test_cpu_is_refused_where_cuda_is_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match='CUDA_VISIBLE_DEVICES=""'):
        select("cpu")


@pytest.mark.parametrize(("platform", "spec"), [(CpuPlatform(), None), (CudaPlatform("te"), "torch")])
def test_flags_are_fields_that_transformer_config_accepts(platform: Platform, spec: Spec | None) -> None:
    flags = platform.megatron_flags(spec)
    fields = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(flags) <= fields
    config = TransformerConfig(
        num_layers=1, hidden_size=8, num_attention_heads=1, num_moe_experts=2, add_bias_linear=False, **flags
    )
    assert {name: getattr(config, name) for name in flags} == flags


def test_te_flags_switch_on_what_the_torch_flags_switch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nemotron3_megatron.platform.cuda.missing_modules", lambda names: [])
    torch_flags, te_flags = (CudaPlatform("te").megatron_flags(spec) for spec in ("torch", "te"))
    assert set(torch_flags) == set(te_flags)
    assert {name for name in te_flags if te_flags[name] != torch_flags[name]} == {
        "transformer_impl",
        "gradient_accumulation_fusion",
        "use_fused_weighted_squared_relu",
        "moe_permute_fusion",
        "moe_grouped_gemm",
    }


@pytest.mark.skipif(not missing_modules(("transformer_engine",)), reason="Transformer Engine is installed")
@pytest.mark.parametrize("platform", [CpuPlatform(), CudaPlatform("torch")])
def test_te_is_refused_without_its_packages_or_device(platform: Platform) -> None:
    with pytest.raises(UserError, match=r"model\.spec=te: .*\n  nearest legal: model\.spec=torch"):
        platform.megatron_flags("te")


@without_cuda
def test_a_rank_without_a_gpu_is_told_how_many_there_are() -> None:
    with pytest.raises(UserError, match=r"local rank 0 \(torchrun\): this node has 0 visible GPUs"):
        CudaPlatform("torch").start(0)


def test_one_thread_a_rank_unless_the_user_says_otherwise(threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    CpuPlatform().start(0)
    assert torch.get_num_threads() == 2
    monkeypatch.delenv("OMP_NUM_THREADS")
    CpuPlatform().start(0)
    assert torch.get_num_threads() == 1


def test_more_ranks_than_cores_is_said_once(
    threads: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(core_count() + 1))
    torch.set_num_threads(1)
    with caplog.at_level(logging.WARNING, logger=cpu.__name__):
        CpuPlatform().start(1)
        CpuPlatform().start(0)
    assert [f"{core_count() + 1} ranks of 1 threads share {core_count()} cores" in m for m in caplog.messages] == [True]


def test_peak_memory_counts_memory_given_back() -> None:
    size = CpuPlatform().peak_memory_bytes()
    block = bytearray(size)  # writes its zeros: all pages become resident, beside the interpreter's 16 MiB and more
    del block
    assert CpuPlatform().peak_memory_bytes() >= size + 2**24


def test_description_names_backend_and_version() -> None:
    assert f"gloo, torch {torch.__version__}" in CpuPlatform().describe()
