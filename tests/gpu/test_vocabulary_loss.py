"""Output layer and cross entropy in one, on a GPU, against the plain computation in float32."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

ROWS, WIDTH, VOCABULARY = 48, 256, 5000


def layer(weight: nn.Parameter, *, fused: bool) -> SimpleNamespace:
    """What the loss uses of Megatron-Core's output layer, in a world of one."""
    alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
    config = SimpleNamespace(gradient_accumulation_fusion=fused)
    return SimpleNamespace(tp_group=alone, sequence_parallel=False, weight=weight, config=config)


def computed(dtype: torch.dtype, *, fused: bool) -> tuple[list[Tensor], list[Tensor]]:
    """Losses, gradient of hidden and of the weight: found, and in float32 from the same numbers."""
    from nemotron3_megatron.model.vocabulary_loss import vocabulary_loss

    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(ROWS, 2, WIDTH, device="cuda", generator=generator).to(dtype).requires_grad_()
    weight = nn.Parameter((torch.randn(VOCABULARY, WIDTH, device="cuda", generator=generator) / 16).to(dtype))
    labels = torch.randint(0, VOCABULARY, (2, ROWS), device="cuda", generator=generator)
    mask = (torch.rand(2, ROWS, device="cuda", generator=generator) > 0.3).float()
    if fused:
        weight.main_grad = torch.ones(VOCABULARY, WIDTH, device="cuda")
    losses = vocabulary_loss(hidden, layer(weight, fused=fused), labels)
    (losses * mask).sum().backward()
    d_weight = weight.main_grad - 1 if fused else weight.grad
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    logits = exact_hidden @ exact_weight.T
    expected = nn.functional.cross_entropy(logits.permute(1, 2, 0), labels, reduction="none")
    (expected * mask).sum().backward()
    return [losses, hidden.grad, d_weight], [expected, exact_hidden.grad, exact_weight.grad]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().float() - expected.detach()).norm() / expected.detach().norm())


def test_float32() -> None:
    for found, expected in zip(*computed(torch.float32, fused=False), strict=True):
        assert error(found, expected) < 1e-5  # sums of at most 5000 float32 terms


@pytest.mark.parametrize("fused", [False, True])
def test_bfloat16(fused: bool) -> None:
    """Logits and their gradients are rounded to BF16 once, 2^-9 each, and the results again."""
    if fused and importlib.util.find_spec("transformer_engine") is None:
        pytest.skip("Transformer Engine is not installed")
    for found, expected in zip(*computed(torch.bfloat16, fused=fused), strict=True):
        assert error(found, expected) < 4 * 2**-9
