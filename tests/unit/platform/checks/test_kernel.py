"""Bounds and comparisons: what is right passes on a CPU, and what is a little wrong fails."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemotron3_megatron.platform.checks import attention, experts, kernel, linears, mamba, router, vocabulary
from nemotron3_megatron.platform.checks.kernel import BEFORE, Draw, KernelFamily, bound, relative_distance
from nemotron3_megatron.platform.checks.outcome import Outcome, UnavailableError

CPU = torch.device("cpu")
FAMILIES = {
    "norm + linear": linears.NORM_LINEAR,
    "column linear": linears.COLUMN_LINEAR,
    "row linear": linears.ROW_LINEAR,
    "attention": attention.ATTENTION,
    "attention of documents": attention.DOCUMENT_ATTENTION,
    "router": router.ROUTER,
    "grouped product": experts.GROUPED_PRODUCT,
    "squared ReLU": experts.WEIGHTED_SQUARED_RELU,
    "convolution": mamba.CONVOLUTION,
    "mixer": mamba.MIXER,
    "norm by group": mamba.GROUP_NORM,
    "vocabulary loss": vocabulary.VOCABULARY_LOSS,
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def with_kernel(family: KernelFamily, made: Callable[..., Tensor]) -> Callable[[torch.dtype], Outcome]:
    """The family's check on the CPU, of another kernel."""
    return partial(replace(family, needs=(), on_cpu=True, kernel=made, note=str), CPU)


def failures(outcome: Outcome) -> set[str]:
    return {comparison.what for comparison in outcome.comparisons if not comparison.passed}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_one_rounding_is_nearly_what_the_bound_takes_it_for(dtype: torch.dtype) -> None:
    """The bound allows twice eps / 4; uniform errors over numbers of all mantissas are 0.14 to 0.29 eps."""
    exact = torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert 0.28 < relative_distance(exact.to(dtype), exact) / bound(1, 0, dtype) < 0.58


def test_bounds_grow_as_random_walks() -> None:
    assert bound(4, 0, torch.bfloat16) == 2 * bound(1, 0, torch.bfloat16) == 2**-7
    assert bound(0, 100, torch.bfloat16) == pytest.approx(2 * 10 * 2**-25)


@every_family
def test_the_reference_in_the_checks_type_passes(family: KernelFamily) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        outcome = with_kernel(family, family.reference)(dtype)
        floating = {f"d{name}" for name, value in family.inputs(Draw(CPU, dtype)).items() if is_floating(value)}
        assert {comparison.what for comparison in outcome.comparisons} == {"y"} | floating
        assert outcome.passed, failures(outcome)


def is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@every_family
def test_an_output_off_by_3_percent_fails(family: KernelFamily) -> None:
    outcome = with_kernel(family, lambda **inputs: 1.03 * family.reference(**inputs))(torch.bfloat16)
    assert "y" in failures(outcome)
    assert not outcome.passed


@every_family
def test_any_one_gradient_off_by_3_percent_fails(family: KernelFamily) -> None:
    def leaky(name: str, **inputs: Any) -> Tensor:
        passed_on = inputs[name].view_as(inputs[name])
        passed_on.register_hook(lambda gradient: 1.03 * gradient)
        return family.reference(**inputs | {name: passed_on})

    for name, value in family.inputs(Draw(CPU, torch.bfloat16)).items():
        if is_floating(value) and name not in ("weight1", "weight5"):  # of experts without rows: no gradient
            assert failures(with_kernel(family, partial(leaky, name))(torch.bfloat16)) == {f"d{name}"}


def test_nan_and_a_wrong_zero_fail() -> None:
    assert failures(with_kernel(linears.ROW_LINEAR, lambda x, weight: x @ weight.T * math.nan)(torch.bfloat16))
    assert relative_distance(torch.ones(4), torch.zeros(4)) == 2.0
    assert relative_distance(torch.zeros(4), torch.zeros(4)) == 0.0


def test_gradients_in_main_grad_are_those_added_to_what_was_there() -> None:
    def adds(add: bool, x: Tensor, weight: nn.Parameter) -> Tensor:
        weight.main_grad = torch.full_like(weight, BEFORE, dtype=torch.float32)  # type: ignore[attr-defined]

        def keep(gradient: Tensor) -> None:
            weight.main_grad.copy_(gradient.float() + add * weight.main_grad)  # type: ignore[attr-defined]

        weight.register_hook(keep)
        return x @ weight.T

    assert with_kernel(linears.COLUMN_LINEAR, partial(adds, True))(torch.bfloat16).passed
    assert failures(with_kernel(linears.COLUMN_LINEAR, partial(adds, False))(torch.bfloat16)) == {"dweight"}


def test_a_lost_gradient_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="no gradient of weight came back"):
        with_kernel(linears.ROW_LINEAR, lambda x, weight: x @ weight.detach().T)(torch.bfloat16)


@pytest.mark.parametrize("family", [experts.WEIGHTED_SQUARED_RELU, vocabulary.VOCABULARY_LOSS])
def test_kernels_with_a_cpu_implementation(family: KernelFamily) -> None:
    assert family(CPU, torch.bfloat16).passed


def test_the_grouped_product_of_torch() -> None:
    """What ``model/device_counts.py`` calls, which itself needs Transformer Engine."""

    def product(x: Tensor, ends: Tensor, **weights: Tensor) -> Tensor:
        return torch._grouped_mm(x, torch.stack([*weights.values()]).transpose(1, 2), offs=ends)

    assert with_kernel(experts.GROUPED_PRODUCT, product)(torch.bfloat16).passed


@pytest.mark.parametrize("packed", [False, True])
def test_the_attention_of_torch(packed: bool) -> None:
    def torch_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        length = query.shape[0]
        allowed = torch.ones(length, length, dtype=torch.bool).tril()
        if packed:
            blocks = [torch.ones(int(n), int(n), dtype=torch.bool) for n in attention.boundaries(length).diff()]
            allowed &= torch.block_diag(*blocks)
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=allowed, enable_gqa=True)
        return y.permute(2, 0, 1, 3).flatten(2)

    right, wrong = (attention.DOCUMENT_ATTENTION, attention.ATTENTION)[:: 1 if packed else -1]
    assert with_kernel(right, torch_attention)(torch.bfloat16).passed
    assert "y" in failures(with_kernel(wrong, torch_attention)(torch.bfloat16))


def test_a_mixer_that_forgets_documents_fails() -> None:
    def forgetful(documents: Tensor, **inputs: Any) -> Tensor:
        return mamba.mixer_reference(documents=torch.zeros_like(documents), **inputs)

    assert "y" in failures(with_kernel(mamba.MIXER, forgetful)(torch.bfloat16))


def test_what_is_missing_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    absent = replace(kernel.PACKAGES[0], distribution="n3-absent", module="n3_absent", install="make n3")
    monkeypatch.setattr(kernel, "PACKAGES", (absent,))
    with pytest.raises(UnavailableError, match="n3-absent is not installed: make n3"):
        replace(linears.ROW_LINEAR, needs=("n3-absent",))(CPU, torch.bfloat16)


def test_cuda_kernels_are_not_tried_on_a_cpu() -> None:
    with pytest.raises(UnavailableError, match="a CUDA kernel"):
        replace(linears.ROW_LINEAR, needs=())(CPU, torch.bfloat16)
