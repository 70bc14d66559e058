"""Parameter counts against the published checkpoints, and against what Megatron really builds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron3_megatron.config import compose
from nemotron3_megatron.config.sizes import layer_size
from nemotron3_megatron.plan.counts import count_parameters, flops_per_token


@pytest.mark.parametrize(
    ("model", "total", "mtp", "active"),
    [
        # Lightning and Super with MTP: element counts of the released checkpoints (Megatron-Bridge verification
        # cards: 32,913,266,240 and 123,611,033,088); Nano and Ultra: the same arithmetic, by hand.
        ("nano", 31_577_940_288, 0, 3_580_076_352),
        ("lightning", 31_577_940_288, 32_913_266_240 - 31_577_940_288, 3_580_076_352),
        ("super", 120_668_707_840, 123_611_033_088 - 120_668_707_840, 12_770_237_440),
        ("ultra", 549_308_993_536, 11_215_610_368, 56_058_843_136),
    ],
)
def test_published_models_to_the_last_digit(model: str, total: int, mtp: int, active: int) -> None:
    counts = count_parameters(compose(["recipe=nano_bf16", f"model={model}"])[0].model)
    assert (counts.total, counts.mtp, counts.active) == (total, mtp, active)


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [
        # README of the published ladder, which rounds so: 315 M / 1 B, 500 M / 2 B, ...
        ("ladder_a315m_1b", 1, 0.315),
        ("ladder_a500m_2b", 2, 0.5),
        ("ladder_a770m_4b", 4, 0.77),
        ("ladder_a1b_7b", 7, 1),
        ("ladder_a2b_14b", 14, 2),
        ("ladder_a3b_30b", 30, 3),
    ],
)
def test_ladder_has_its_published_sizes(model: str, total: float, active: float) -> None:
    """To the digits of the rungs' names; where a name has one digit, half of its last place or so."""
    recipe = compose(["recipe=nano_bf16", f"model={model}"])[0]
    counts = count_parameters(recipe.model)
    assert counts.total / 1e9 == pytest.approx(total, abs=0.5, rel=0.06)
    # The largest rung is named without one embedding, as the Nano report counts (3.2B; 3.6B with both).
    named = counts.active - (recipe.model.vocab_size * recipe.model.hidden_size if model == "ladder_a3b_30b" else 0)
    assert named / 1e9 == pytest.approx(active, rel=0.11)


def test_ablation_has_its_published_sizes() -> None:
    """White paper, Table 1: 8.09B active of 72.6B against 8.02B of 72.8B (the last within 0.6 %: docs/recipes.md)."""
    standard, latent = (
        count_parameters(compose(["recipe=nano_bf16", f"model={model}"])[0].model)
        for model in ("standard_moe_8b", "latent_moe_8b")
    )
    assert (f"{standard.active / 1e9:.2f}", f"{standard.total / 1e9:.1f}") == ("8.09", "72.6")
    assert f"{latent.total / 1e9:.1f}" == "72.8"
    assert latent.active / 1e9 == pytest.approx(8.02, rel=0.006)


@pytest.mark.parametrize(
    ("model", "one_embedding", "both"),
    [
        ("nano", "3.2", "3.6"),  # Nano report: 3.2B active, 3.6B with embeddings
        ("ultra", "55", "56"),  # Ultra report: 55B active
    ],
)
def test_reports_count_active_parameters_with_one_embedding(model: str, one_embedding: str, both: str) -> None:
    recipe = compose(["recipe=nano_bf16", f"model={model}"])[0].model
    active = count_parameters(recipe).active
    digits = 1 if "." in both else 0
    assert f"{active / 1e9:.{digits}f}" == both
    assert f"{(active - recipe.vocab_size * recipe.hidden_size) / 1e9:.{digits}f}" == one_embedding


def test_layers_of_super() -> None:
    model = compose(["recipe=super_bf16"])[0].model
    assert [layer_size(model, kind).total for kind in ("mamba", "attention", "moe")] == [
        109_640_064,
        35_655_680,
        2_873_102_848,
    ]
    layers = count_parameters(model).layers
    assert [layer.index for layer in layers if layer.kind == "attention"] == [7, 16, 25, 36, 47, 58, 69, 78]


def test_unshared_depths_count_each_block() -> None:
    model = compose(["recipe=tiny"])[0].model
    shared = count_parameters(model).mtp
    assert count_parameters(replace(model, mtp_use_repeated_layer=False)).mtp == 2 * shared


def test_flops_are_near_the_published_throughput() -> None:
    """Super on H100, sequences of 4096: 2,969 tokens/s at 248.6 TFLOP/s (Megatron-Bridge card), 83.7 GFLOP a token.

    Ours counts the eh_proj of both MTP depths besides (2 * 3 * 4 * 4096^2 = 0.4 GFLOP), hence within 1 %.
    """
    model = compose(["recipe=super_bf16"])[0].model
    assert flops_per_token(model, 4096) == pytest.approx(248.6e12 / 2969, rel=0.01)
