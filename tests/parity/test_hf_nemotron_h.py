"""Our HybridModel against Hugging Face transformers' own ``nemotron_h``, on the same weights.

transformers has no multi-token prediction (test_mtp.py does that) and no balancing loss (coefficient 0 here).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_models import every_layer_kind
from torch import Tensor
from transplant import errors, in_double, their_names, transplant

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.data.batch import MicroBatch, build_micro_batch
from nemotron3_megatron.model.hybrid import Nemotron3Model

Build = Callable[[ModelConfig], Nemotron3Model]
Float64 = Callable[[], AbstractContextManager[None]]
Document = tuple[int, slice]
"""Row of the batch and positions in it."""

LATENT = pytest.mark.parametrize("latent", [None, 16], ids=["moe", "latent_moe"])
EOD = 0


def windows(ends: tuple[int, ...] = ()) -> Tensor:
    """(2, 46) token ids whose first row has an end of document at the positions ``ends``."""
    ids = torch.randint(1, 96, (2, 46), generator=torch.Generator().manual_seed(2))
    ids[0, list(ends)] = EOD
    return ids


def our_results(ours: Nemotron3Model, model: ModelConfig, batch: MicroBatch, isolated: bool) -> dict[str, Tensor]:
    """Logits, and by transformers' names the gradients of the mean loss that our training forward gives."""
    documents = batch.documents if isolated else None
    ours.zero_grad()
    losses = ours(batch.tokens, batch.position_ids, batch.labels, documents)
    (losses * batch.loss_mask).sum().div(batch.loss_mask.sum()).backward()
    with torch.no_grad():
        logits = ours(batch.tokens, batch.position_ids, documents=documents)
    gradients = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    return {"logits": logits} | their_names(gradients, model)


def their_results(theirs: Any, ids: Tensor, documents: list[Document]) -> dict[str, Tensor]:
    """The same from transformers, which is given each document by itself: its last token predicts nothing."""
    theirs.zero_grad()
    logits = torch.zeros(ids.shape[0], ids.shape[1] - 1, theirs.config.vocab_size, dtype=theirs.dtype)
    total, count = torch.zeros((), dtype=theirs.dtype), 0
    for row, where in documents:
        text = ids[row, where]
        inputs = text[: logits.shape[1] - where.start]
        found = theirs(inputs[None]).logits[0]
        predicted = min(len(inputs), len(text) - 1)
        total = total + F.cross_entropy(found[:predicted], text[1 : predicted + 1], reduction="sum")
        count += predicted
        logits[row, where.start : where.start + len(inputs)] = found.detach()
    total.div(count).backward()
    return {"logits": logits} | {name: p.grad for name, p in theirs.named_parameters()}


ROWS: list[Document] = [(0, slice(0, 46)), (1, slice(0, 46))]


@LATENT
def test_same_function(latent: int | None, build: Build, nemotron_h: ModuleType, in_float64: Float64) -> None:
    """Logits and every gradient in float64: equal to 1e-10, so no epsilon, scale, order or bias differs."""
    model = every_layer_kind(latent)
    ours = build(model)
    theirs = transplant(dict(ours.state_dict()), model, nemotron_h)
    ids = windows()
    with in_float64():
        batch = build_micro_batch(ids, mtp_depths=0, eod_token=EOD, isolate_documents=False)
        found = our_results(in_double(ours), model, batch, isolated=False)
        expected = their_results(theirs.double(), ids, ROWS)
    worst = errors(found, expected)
    assert max(worst.values()) < 1e-10, worst


def test_packed_documents_are_separate_sequences(build: Build, nemotron_h: ModuleType, in_float64: Float64) -> None:
    """A packed row gives what transformers gives for each of its documents alone (of 1, 2, 18 and 25 tokens)."""
    model = every_layer_kind(16)
    ours = build(model)
    theirs = transplant(dict(ours.state_dict()), model, nemotron_h)
    ends = (0, 2, 20)
    ids = windows(ends)
    starts = [0, *(end + 1 for end in ends), 46]
    documents = [(0, slice(*cut)) for cut in pairwise(starts)] + ROWS[1:]
    with in_float64():
        batch = build_micro_batch(ids, mtp_depths=0, eod_token=EOD, isolate_documents=True)
        found = our_results(in_double(ours), model, batch, isolated=True)
        expected = their_results(theirs.double(), ids, documents)
    worst = errors(found, expected)
    assert max(worst.values()) < 1e-10, worst


@LATENT
def test_float32_rounds_no_worse(
    latent: int | None,
    build: Build,
    nemotron_h: ModuleType,
    in_float64: Float64,
    record_property: Callable[[str, object], None],
) -> None:
    """In float32 our distance from the exact (float64) result is that of transformers' float32.

    Both do the same operations in another order: their errors are draws of one size, which the reference measures
    as its worst tensor of about 80. Ours may be the less lucky draw: 8 times, one decimal digit less 20 %.
    """
    model = every_layer_kind(latent)
    ours = build(model)
    theirs = transplant(dict(ours.state_dict()), model, nemotron_h)
    ids = windows()
    batch = build_micro_batch(ids, mtp_depths=0, eod_token=EOD, isolate_documents=False)
    found, reference = our_results(ours, model, batch, isolated=False), their_results(theirs, ids, ROWS)
    with in_float64():
        exact = their_results(theirs.double(), ids, ROWS)
    worst, yardstick = max(errors(found, exact).values()), max(errors(reference, exact).values())
    record_property("max_relative_error", worst)
    record_property("max_relative_error_of_transformers", yardstick)
    assert yardstick < 1e-4, "the reference is not in float32"
    assert worst <= 8 * yardstick
