"""Cross entropy by the Triton kernels (run by Triton's interpreter on a CPU) and in torch, against torch in float64."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nemotron3_megatron.model import cross_entropy
from nemotron3_megatron.model.kernels import cross_entropy as kernels


@pytest.fixture(scope="module", params=["kernels", "torch"])
def interpreter(request: pytest.FixtureRequest) -> Iterator[ProcessPoolExecutor | None]:
    """A process of its own for the kernels: whether Triton interprets is settled when it is imported."""
    if request.param == "torch":
        yield None
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _without_warnings) as process:
            yield process


def _without_warnings() -> None:
    np.seterr(all="ignore")


def row_statistics(interpreter: ProcessPoolExecutor | None, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    if interpreter is None:
        return cross_entropy.row_statistics(*args)
    return interpreter.submit(kernels.row_statistics, *args).result()


def gradient(interpreter: ProcessPoolExecutor | None, logits: Tensor, *args: Any) -> Tensor:
    if interpreter is None:
        cross_entropy.logits_to_gradient(own := logits.clone(), *args)
        return own
    return interpreter.submit(_overwritten, logits, *args).result()


def _overwritten(logits: Tensor, *args: Any) -> Tensor:
    kernels.logits_to_gradient(logits, *args)
    return logits


def batch(rows: int, vocabulary: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    logits = 4 * torch.randn(rows, vocabulary, generator=generator)
    logits[0] = -1e4 + logits[0]  # far from zero: an exponential without the maximum underflows
    return logits.to(dtype), torch.randint(0, vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocabulary", [100, 4096, 9000])
def test_one_shard(interpreter: ProcessPoolExecutor | None, vocabulary: int, dtype: torch.dtype) -> None:
    logits, labels = batch(5, vocabulary, dtype)
    weight = torch.tensor([1.0, 0.0, 0.25, 2.0, 1.0])
    exact = logits.double().requires_grad_()
    losses = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (losses * weight).sum().backward()

    largest, total, target = row_statistics(interpreter, logits, labels, 0)
    log_sum = total.log() + largest
    # Sums of float32 exponentials, each within a few units of 2^-24, of logits up to 1e4 (row 0) or 20.
    torch.testing.assert_close((log_sum - target).double(), losses.detach(), rtol=1e-5, atol=2e-3)
    torch.testing.assert_close((log_sum - target)[1:].double(), losses.detach()[1:], rtol=1e-5, atol=1e-5)
    found = gradient(interpreter, logits, labels, 0, log_sum, weight)
    assert exact.grad is not None
    tolerance = {"rtol": 2e-3, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 1e-6}
    torch.testing.assert_close(found.double(), exact.grad, **tolerance)
    assert not found[1].any()


def test_shards_of_the_vocabulary_add_up(interpreter: ProcessPoolExecutor | None) -> None:
    logits, labels = batch(6, 300, torch.float32)
    expected = torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    shards = [part.contiguous() for part in logits.split(100, dim=1)]
    found = [row_statistics(interpreter, part, labels, 100 * i) for i, part in enumerate(shards)]
    highest = torch.stack([largest for largest, _, _ in found]).amax(0)
    total = sum(total * (largest - highest).exp() for largest, total, _ in found)
    log_sum = total.log() + highest
    target = sum(target for _, _, target in found)
    torch.testing.assert_close((log_sum - target)[1:].double(), expected[1:], rtol=1e-5, atol=1e-5)
    whole = torch.cat(
        [gradient(interpreter, part, labels, 100 * i, log_sum, torch.ones(6)) for i, part in enumerate(shards)], 1
    )
    one_hot = torch.nn.functional.one_hot(labels, 300)
    torch.testing.assert_close(whole[1:], (logits.softmax(1) - one_hot)[1:], rtol=1e-4, atol=1e-6)


def test_masked_rows_are_not_read(interpreter: ProcessPoolExecutor | None) -> None:
    """Whatever padding holds, its gradient is zero."""
    logits = torch.full((2, 64), torch.nan)
    found = gradient(interpreter, logits, torch.zeros(2, dtype=torch.int64), 0, torch.zeros(2), torch.zeros(2))
    assert not found.any()
