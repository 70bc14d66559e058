"""Output layer and loss in one, in parts or whole, against torch's cross entropy on float64 logits."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nemotron3_megatron  # noqa: F401  (before any Megatron-Core import: it installs the CPU platform)
from nemotron3_megatron.model import cross_entropy
from nemotron3_megatron.model.logits import rows_at_a_time
from nemotron3_megatron.model.vocabulary_loss import vocabulary_loss

LENGTH, BATCH, WIDTH, VOCABULARY = 200, 2, 24, 300
WHOLE, PARTS = 2**40, VOCABULARY * 4 * 130
"""Limits in bytes; the second makes three parts of 128 of the 400 rows, and one of 16."""


def _computed(dtype: torch.dtype, limit_bytes: int) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, gradients of hidden and weight: found, and in float64 from the same numbers."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(LENGTH, BATCH, WIDTH, generator=generator).to(dtype).requires_grad_()
    weight = nn.Parameter(torch.randn(VOCABULARY, WIDTH, generator=generator).to(dtype))
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    mask = (torch.rand(BATCH, LENGTH, generator=generator) > 0.3).to(dtype)
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = SimpleNamespace(gradient_accumulation_fusion=False)
    layer: Any = SimpleNamespace(tp_group=alone, sequence_parallel=False, weight=weight, config=config)
    losses = vocabulary_loss(hidden, layer, labels, limit_bytes)
    (losses * mask).sum().backward()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    expected = nn.functional.cross_entropy((exact_hidden @ exact_weight.T).permute(1, 2, 0), labels, reduction="none")
    (expected * mask).sum().backward()
    found = [losses.detach(), hidden.grad, weight.grad]
    return found, [expected.detach(), exact_hidden.grad, exact_weight.grad]  # type: ignore[return-value]


@pytest.mark.parametrize("limit_bytes", [WHOLE, PARTS], ids=["whole", "parts"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)])
def test_against_torch(dtype: torch.dtype, bound: float, limit_bytes: int) -> None:
    """Sums of up to 400 terms of relative error 2^-53, 2^-24 or (rounded logits and gradients) 2^-9."""
    for found, expected in zip(*_computed(dtype, limit_bytes), strict=True):
        assert float((found.double() - expected).norm() / expected.norm()) < bound


def test_all_logits_exist_only_where_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    statistics = cross_entropy.row_statistics

    def watched(logits: Tensor, *rest: Any) -> Any:
        seen.append(logits.shape[0])
        return statistics(logits, *rest)

    monkeypatch.setattr(cross_entropy, "row_statistics", watched)
    _computed(torch.float32, WHOLE)
    _computed(torch.float32, PARTS)
    assert seen == [400, 128, 128, 128, 16]


def test_rows_of_a_part() -> None:
    assert rows_at_a_time(8192, 131072, 2) == 8192
    assert rows_at_a_time(16384, 131072, 2) == 16384
    assert rows_at_a_time(524288, 131072, 2) == 16384
    assert rows_at_a_time(1000, 10**9, 2) == 128
    assert rows_at_a_time(0, 131072, 2) == 1
