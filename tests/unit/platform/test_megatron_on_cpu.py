"""Real Megatron-Core code on CPU: generators, tensor types, gradient clipping, a parallel layer."""

from __future__ import annotations

import logging
import types
from collections.abc import Iterator

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32, get_grad_norm_fp32
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker, model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils

from nemotron3_megatron.platform import amendments, cuda_on_cpu


@pytest.fixture
def one_rank() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel(create_gloo_process_groups=False)
    model_parallel_cuda_manual_seed(1)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tensor_types_are_named_as_on_cuda(dtype: torch.dtype, device: str) -> None:
    kind = {torch.float32: "Float", torch.bfloat16: "BFloat16", torch.float16: "Half"}[dtype]
    assert cuda_on_cpu.type_name(torch.empty(1, dtype=dtype, device=device)) == f"torch.cuda.{kind}Tensor"


def test_what_has_a_type_but_is_no_tensor_keeps_its_answer() -> None:
    class Token:
        def type(self) -> str:
            return "word"

    assert cuda_on_cpu.type_name(Token()) == "word"


def test_current_device_follows_the_meta_context() -> None:
    assert cuda_on_cpu.current_device() == torch.device("cpu")
    with torch.device("meta"):
        assert cuda_on_cpu.current_device() == torch.device("meta")


def test_compile_nothing_in_its_three_forms() -> None:
    def double(x: int) -> int:
        return 2 * x

    assert cuda_on_cpu.compile_nothing(double) is double
    assert cuda_on_cpu.compile_nothing(dynamic=True)(double) is double


def test_names_we_do_not_define_are_those_of_torch() -> None:
    assert cuda_on_cpu.is_available() is False
    assert cuda_on_cpu.CUDAGraph is torch.cuda.CUDAGraph


def test_forked_generators_are_independent_and_restored(caplog: pytest.LogCaptureFixture) -> None:
    def numbers(tracker: CudaRNGStatesTracker, name: str) -> list[float]:
        with tracker.fork(name):
            return torch.rand(3).tolist()

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    torch.manual_seed(3)
    with caplog.at_level(logging.WARNING):
        mixed = [numbers(tracker, "a"), torch.rand(3).tolist(), numbers(tracker, "b"), numbers(tracker, "a")]
    assert not caplog.records

    def stream(seed: int, count: int) -> list[float]:
        return torch.rand(count, generator=torch.Generator().manual_seed(seed)).tolist()

    assert mixed == [stream(1, 3), stream(3, 3), stream(2, 3), stream(1, 6)[3:]]


def test_recomputed_dropout_draws_the_same_mask(one_rank: None) -> None:
    x = torch.ones(64, requires_grad=True)
    y = tensor_parallel.checkpoint(lambda t: torch.nn.functional.dropout(t, 0.5), False, x)
    y.sum().backward()
    assert x.grad is not None
    # d(sum of x * mask)/dx is the mask, and x is all ones: output and gradient agree if the masks do.
    assert torch.equal(x.grad, y.detach())
    assert 0 < (x.grad == 0).sum() < 64


def test_gradient_norm_and_clipping_equal_those_of_torch(one_rank: None) -> None:
    ours = [torch.nn.Parameter(torch.randn(5, 3)), torch.nn.Parameter(torch.randn(7))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    for a, b in zip(ours, theirs, strict=True):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    norm = get_grad_norm_fp32([p.grad for p in ours], grad_stats_parallel_group=torch.distributed.group.WORLD)
    clip_grad_by_total_norm_fp32(ours, max_norm=0.5, total_norm=norm)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm=0.5)
    # Both sum 22 float32 squares in some order: relative error below 22 * 2**-24.
    assert norm == pytest.approx(expected.item(), rel=22 * 2**-24)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=0)


def test_a_parallel_linear_layer_equals_torch(one_rank: None) -> None:
    layer = tensor_parallel.ColumnParallelLinear(
        8, 6, config=ModelParallelConfig(), init_method=torch.nn.init.normal_, bias=False
    )
    assert layer.weight.device.type == "cpu"
    x = torch.randn(4, 2, 8, requires_grad=True)
    y, _ = layer(x)
    (y**2).sum().backward()
    reference = x.detach().clone().requires_grad_()
    weight = layer.weight.detach().clone().requires_grad_()
    (torch.nn.functional.linear(reference, weight) ** 2).sum().backward()
    # The same float32 GEMMs with at most 8 terms an element, in another order at most.
    torch.testing.assert_close(x.grad, reference.grad, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.weight.grad, weight.grad, rtol=1e-5, atol=1e-5)


def test_split_sizes_become_numpy() -> None:
    splits = moe_utils.maybe_move_tensor_to_cpu(torch.tensor([3, 1]), as_numpy=True)
    assert type(splits).__module__ == "numpy"
    assert splits.tolist() == [3, 1]
    assert moe_utils.maybe_move_tensor_to_cpu([3, 1], as_numpy=True) == [3, 1]


def test_an_amended_function_that_is_gone_is_an_error() -> None:
    with pytest.raises(ImportError, match=r"moe_utils has no maybe_move_tensor_to_cpu.*not supported on CPU"):
        amendments.apply(types.ModuleType("megatron.core.transformer.moe.moe_utils"))
