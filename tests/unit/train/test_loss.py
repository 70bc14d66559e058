"""The loss over a global batch against plain arithmetic, where masks are uneven over micro-batches and depths."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.telemetry.records import TagLoss
from nemotron3_megatron.train.loss import Losses, loss_weights, mean_losses, weighted_loss

CPU = torch.device("cpu")


def model(depths: int, factor: float = 0.3) -> ModelConfig:
    return ModelConfig(
        pattern="M",
        hidden_size=8,
        vocab_size=8,
        mtp_pattern="*E" if depths else "",
        mtp_depths=depths,
        mtp_loss_scaling_factor=factor,
    )


def micro_batch(mask: Tensor) -> MicroBatch:
    """Only the mask (1 + D, b, s) matters to the loss."""
    nothing = torch.zeros(mask.shape[1:], dtype=torch.int64)
    return MicroBatch(
        tokens=nothing,
        labels=torch.zeros(mask.shape, dtype=torch.int64),
        loss_mask=mask,
        position_ids=nothing,
        documents=nothing.int(),
    )


def step(losses: list[Tensor], masks: list[Tensor], config: ModelConfig) -> tuple[float, list[Tensor], list[float]]:
    """What the pipeline schedule and Megatron-Core's finalisation make of the micro-batches.

    Returns the loss that is minimised, its gradient by each micro-batch's losses, and the reported means.
    """
    batches = [micro_batch(mask) for mask in masks]
    weights = loss_weights(batches, config, [], CPU)
    leaves = [loss.clone().requires_grad_() for loss in losses]
    parts = [weighted_loss(leaf, mask, weights) for leaf, mask in zip(leaves, masks, strict=True)]
    assert all(int(count) == 0 for _, count, _ in parts)
    total = sum((scalar for scalar, _, _ in parts), start=torch.zeros(()))
    total.backward()
    reported = list(mean_losses(torch.stack([sums for _, _, sums in parts]).sum(dim=0), weights)().depths)
    return float(total.detach()), [leaf.grad for leaf in leaves if leaf.grad is not None], reported


def test_mtp_is_normalised_over_the_global_batch() -> None:
    """Megatron-LM #7452 item 3: three tokens of loss 2, 3, 5 beside one token of loss 6 mean 4.

    The mean of the two micro-batches' means, 10/3 and 6, is 14/3.
    """
    masks = [torch.tensor([[[1.0, 1, 1]], [[1.0, 1, 1]]]), torch.tensor([[[1.0, 1, 1]], [[1.0, 0, 0]]])]
    losses = [torch.tensor([[[1.0, 1, 1]], [[2.0, 3, 5]]]), torch.tensor([[[1.0, 1, 1]], [[6.0, 9, 9]]])]
    total, _, reported = step(losses, masks, model(1, factor=1.0))
    assert reported == [1.0, 4.0]
    assert total == 1.0 + 4.0


mask_bits = st.integers(0, 2**12 - 1)


@given(st.lists(st.tuples(mask_bits, mask_bits, mask_bits), min_size=1, max_size=4), st.integers(0, 2**31))
def test_equals_plain_arithmetic(bits: list[tuple[int, int, int]], seed: int) -> None:
    """Two depths, micro-batches of (2, 6) tokens, any masks, also empty ones."""
    generator = torch.Generator().manual_seed(seed)
    masks = [torch.tensor([[float(b >> i & 1) for i in range(12)] for b in row]).reshape(3, 2, 6) for row in bits]
    losses = [torch.rand((3, 2, 6), generator=generator) * 10 for _ in masks]
    total, gradients, reported = step(losses, masks, model(2, factor=0.3))

    kept: list[list[float]] = [
        [float(v) for loss, mask in zip(losses, masks, strict=True) for v in loss[depth][mask[depth] > 0]]
        for depth in range(3)
    ]
    means = [math.fsum(values) / len(values) if values else math.nan for values in kept]
    # Sums of at most 48 float32 terms of one sign: 48 * 2^-24 = 2.9e-6.
    assert reported == pytest.approx(means, rel=3e-6, nan_ok=True)
    if kept[0]:
        wanted = means[0] + 0.3 / 2 * sum(mean for mean in means[1:] if not math.isnan(mean))
        assert total == pytest.approx(wanted, rel=6e-6)
    for gradient, mask in zip(gradients, masks, strict=True):
        for depth, weight in enumerate((1.0, 0.15, 0.15)):
            if kept[0] and kept[depth]:
                # Each token of a depth has the same weight, wherever it lies; others have none.
                expected = mask[depth] * weight / len(kept[depth])
                torch.testing.assert_close(gradient[depth], expected, rtol=1e-6, atol=0)


@given(st.lists(mask_bits, min_size=2, max_size=6), st.data())
def test_how_the_batch_is_cut_does_not_matter(bits: list[int], data: st.DataObject) -> None:
    masks = torch.tensor([[float(b >> i & 1) for i in range(12)] for b in bits]).reshape(-1, 2, 6).transpose(0, 1)
    losses = torch.rand(masks.shape, generator=torch.Generator().manual_seed(0))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(bits) - 1))))
    places = list(pairwise([0, *cuts, len(bits)]))
    whole = step([losses], [masks], model(1))
    cut = step([losses[:, a:b] for a, b in places], [masks[:, a:b] for a, b in places], model(1))
    assert cut[0] == pytest.approx(whole[0], rel=6e-6)
    assert cut[2] == pytest.approx(whole[2], rel=6e-6, nan_ok=True)
    torch.testing.assert_close(torch.cat(cut[1], dim=1), whole[1][0], rtol=1e-6, atol=0)


def test_nothing_to_learn_from() -> None:
    """A depth without tokens is reported as NaN and adds neither loss nor gradient."""
    masks = [torch.stack([torch.ones(1, 4), torch.zeros(1, 4)])]
    total, gradients, reported = step([torch.full((2, 1, 4), 2.0)], masks, model(1))
    assert total == 2.0
    assert reported[0] == 2.0
    assert math.isnan(reported[1])
    assert gradients[0][1].abs().max() == 0


def test_counts_are_exact_beyond_float32() -> None:
    """Odd numbers above 2^24 do not exist in float32."""
    many = replace(micro_batch(torch.ones(1, 1, 1)), loss_mask=torch.ones(1).expand(1, 4097, 4097))
    weights = loss_weights([many], model(0), [], CPU)
    assert weights.counts.tolist() == [4097**2]


def by_tag(losses: Tensor, mask: Tensor, tags: list[list[bool]], names: list[str]) -> Losses:
    """(1 + D, b, s) losses and mask, in micro-batches of one sequence."""
    config, rows = model(len(losses) - 1), torch.tensor(tags)
    batches = [replace(micro_batch(mask[:, i : i + 1]), tags=rows[i : i + 1]) for i in range(len(tags))]
    weights = loss_weights(batches, config, [], CPU)
    parts = [
        weighted_loss(losses[:, i : i + 1], batch.loss_mask, weights, batch.tags) for i, batch in enumerate(batches)
    ]
    return mean_losses(torch.stack([reported for _, _, reported in parts]).sum(dim=0), weights, names)()


def test_main_loss_by_tag() -> None:
    """Sequences of code lose 1, 3 and 5, those of the web 10; MTP's losses of 100 are of no tag."""
    losses = torch.tensor([[[1.0, 3.0], [10.0, 10.0], [5.0, 7.0]], [[100.0, 100.0]] * 3])
    mask = torch.tensor([[[1.0, 1.0], [1.0, 1.0], [1.0, 0.0]], [[1.0, 0.0]] * 3])
    code, web = [True, False, False], [False, True, False]
    found = by_tag(losses, mask, [code, web, code], ["code", "web", "absent"])
    assert found == Losses((29 / 5, 100.0), {"code": TagLoss(3.0, 3), "web": TagLoss(10.0, 2)})


def test_a_loss_that_is_not_finite_stays_with_its_tag() -> None:
    losses = torch.tensor([[[1.0, math.inf], [2.0, 2.0]]])
    found = by_tag(losses, torch.ones(1, 2, 2), [[True, False], [False, True]], ["bad", "good"])
    assert found.tags == {"bad": TagLoss(math.inf, 2), "good": TagLoss(2.0, 2)}


def test_tags_change_neither_loss_nor_gradient() -> None:
    losses = torch.rand((3, 2, 6), generator=torch.Generator().manual_seed(1)) * 10
    mask = torch.ones(3, 2, 6)
    outcomes = []
    for tags in (None, torch.tensor([[True, False], [False, True]])):
        weights = loss_weights([replace(micro_batch(mask), tags=tags)], model(2), [], CPU)
        leaf = losses.clone().requires_grad_()
        total, tokens, reported = weighted_loss(leaf, mask, weights, tags)
        total.backward()
        outcomes.append(
            (total.item(), tokens.item(), reported[:3].tolist(), leaf.grad.tolist(), weights.scales.tolist())
        )
    assert outcomes[0] == outcomes[1]
