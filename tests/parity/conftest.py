"""Third-party references in pure torch, our model in one process, and float64 for code that asks for float32."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers.models.nemotron_h import modeling_nemotron_h

import nemotron3_megatron  # noqa: F401  (installs the CPU platform before Megatron-Core is imported)
from nemotron3_megatron.config import resolve
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.config.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    Recipe,
    StageConfig,
    TelemetryConfig,
)
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select

sys.path.insert(0, str(Path(__file__).parent))  # modules shared by the tests here


@pytest.fixture
def nemotron_h(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """transformers' ``nemotron_h``, on its torch implementations even where CUDA kernels are installed."""
    for name in (
        "causal_conv1d_fn",
        "causal_conv1d_update",
        "mamba2_chunk_scan",
        "mamba2_selective_state_update",
        "mamba2_split_conv1d_scan_combined",
    ):
        monkeypatch.setattr(modeling_nemotron_h, name, inspect.unwrap(getattr(modeling_nemotron_h, name)))
    return modeling_nemotron_h


@pytest.fixture
def build() -> Iterator[Callable[[ModelConfig], Nemotron3Model]]:
    """Our model on one rank in this process, torch spec, float32, every parameter away from its neutral value."""
    platform = select("cpu")

    def build(model: ModelConfig) -> Nemotron3Model:
        run = resolve(_recipe(model), world_size=1)
        platform.start(0)
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        (chunk,) = build_model(run, platform, start_groups(run, platform))
        _disturb(chunk)
        return chunk

    yield build
    stop_groups()


def _recipe(model: ModelConfig) -> Recipe:
    return Recipe(
        name="parity",
        model=model,
        precision=PrecisionConfig(name="fp32", dtype="fp32"),
        parallel=ParallelConfig(),
        optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-4, lr_decay_style="constant"),
        stages={"only": StageConfig(tokens=Duration(1, "steps"), seq_length=64, global_batch_size=1)},
        data=DataConfig(sources={}),
        checkpoint=CheckpointConfig(),
        telemetry=TelemetryConfig(),
        device="cpu",
    )


def _disturb(model: Nemotron3Model) -> None:
    """Norm weights, D and expert biases start as ones and zeros, which would hide a missing or swapped one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            noise = torch.rand(tensor.shape, generator=generator) - 0.5
            if "norm" in name or name.endswith(".D"):
                tensor.copy_(1 + noise)
            elif name.endswith("expert_bias"):
                tensor.copy_(0.2 * noise)


@pytest.fixture
def in_float64() -> Callable[[], AbstractContextManager[None]]:
    """A context in which whoever asks torch for float32 gets float64.

    Both implementations cast to float32 in norms, routers, state spaces and losses. With the casts (``.float()``,
    ``torch.float32``) lifted, two implementations of one function agree to 1e-10 or they differ.
    """

    @contextmanager
    def lifted() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "float", torch.Tensor.double)
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            yield

    return lifted
