"""Sampling against its definition and its statistics."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.sampling import Sampling, distribution, draw, truncated


def next_token(logits: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    return draw(distribution(logits, sampling), generator)


_logits = st.lists(st.floats(-20, 20), min_size=1, max_size=30).map(lambda x: torch.tensor(x, dtype=torch.float64))


@given(_logits, st.floats(0.01, 1.0))
def test_the_nucleus_is_the_smallest_likely_set(logits: torch.Tensor, top_p: float) -> None:
    probabilities = torch.softmax(logits, 0)
    kept = truncated(probabilities, Sampling(top_p=top_p))
    inside = kept > 0
    mass = probabilities[inside].sum().item()
    # Sums of at most 30 doubles in two orders: a few times 30 roundings of 1.1e-16.
    slack = 1e-14
    assert kept.sum().item() == pytest.approx(1)
    assert mass >= top_p - slack
    assert mass - probabilities[inside].min().item() < top_p + slack  # without its least likely token it is too small
    if not inside.all():
        assert probabilities[~inside].max() <= probabilities[inside].min()
    assert torch.allclose(kept[inside] * mass, probabilities[inside])


@given(_logits, st.integers(0, 100))
def test_temperature_zero_is_greedy_and_uses_no_randomness(logits: torch.Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = generator.get_state()
    token = next_token(logits, Sampling(temperature=0, top_p=0.3), generator)
    assert logits[token] == logits.max()
    assert torch.equal(generator.get_state(), before)


@given(_logits, st.integers(0, 100))
def test_a_tiny_nucleus_is_the_most_likely_token(logits: torch.Tensor, seed: int) -> None:
    token = next_token(logits, Sampling(temperature=1, top_p=1e-9), torch.Generator().manual_seed(seed))
    # Logits up to 20 closer than a few of their roundings (3.6e-15) have equal probabilities.
    assert logits[token] >= logits.max() - 1e-13


@given(_logits, st.integers(0, 40))
def test_top_k_keeps_the_most_likely_tokens(logits: torch.Tensor, top_k: int) -> None:
    probabilities = torch.softmax(logits, 0)
    kept = truncated(probabilities, Sampling(top_k=top_k, top_p=1.0))
    inside = kept > 0
    assert inside.sum() == (min(top_k, len(logits)) or len(logits))
    if not inside.all():
        assert probabilities[~inside].max() <= probabilities[inside].min()
    assert torch.allclose(kept[inside] * probabilities[inside].sum(), probabilities[inside])


@given(_logits, st.floats(0, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_most_likely(logits: torch.Tensor, min_p: float) -> None:
    probabilities = torch.softmax(logits, 0)
    kept = truncated(probabilities, Sampling(min_p=min_p, top_p=1.0))
    inside = probabilities >= min_p * probabilities.max()
    assert torch.equal(kept > 0, inside)
    assert torch.allclose(kept[inside] * probabilities[inside].sum(), probabilities[inside])


def test_truncations_follow_one_another() -> None:
    probabilities = torch.tensor([0.05, 0.4, 0.1, 0.25, 0.2], dtype=torch.float64)
    # The 3 most likely are 0.4, 0.25, 0.2 of 0.85; the first two hold 0.76 of that, and 0.25 is less than 0.7 * 0.4.
    three = Sampling(top_k=3, top_p=1.0)
    assert torch.allclose(
        truncated(probabilities, three), torch.tensor([0, 8, 0, 5, 4]).double() / 17, atol=1e-15, rtol=0
    )
    two = Sampling(top_k=3, top_p=0.75)
    assert torch.allclose(
        truncated(probabilities, two), torch.tensor([0, 8, 0, 5, 0]).double() / 13, atol=1e-15, rtol=0
    )
    one = Sampling(top_k=3, top_p=0.75, min_p=0.7)
    assert torch.equal(truncated(probabilities, one), torch.tensor([0.0, 1, 0, 0, 0]).double())


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 1.0), (2.0, 0.8), (0.8, 0.95)])
def test_frequencies_are_those_of_the_tempered_nucleus(temperature: float, top_p: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, -0.5, -3.0], dtype=torch.float64)
    weights = [math.exp(value / temperature) for value in logits.tolist()]  # already in falling order
    share = [weight / sum(weights) for weight in weights]
    size = next(n for n in range(1, 6) if sum(share[:n]) >= top_p - 1e-12)
    expected = [value / sum(share[:size]) if n < size else 0.0 for n, value in enumerate(share)]

    draws, generator = 4000, torch.Generator().manual_seed(0)
    sampling = Sampling(temperature=temperature, top_p=top_p)
    counts = torch.bincount(
        torch.tensor([next_token(logits, sampling, generator) for _ in range(draws)]), minlength=5
    ).tolist()
    for count, probability in zip(counts, expected, strict=True):
        # Five standard deviations of a binomial count.
        assert abs(count - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability))


def test_the_generator_decides_the_draws() -> None:
    logits = torch.zeros(50)

    def draws(seed: int) -> list[int]:
        generator = torch.Generator().manual_seed(seed)
        return [next_token(logits, Sampling(), generator) for _ in range(20)]

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    state = torch.random.get_rng_state()
    draws(3)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left alone


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e308])
def test_any_temperature_gives_a_distribution(temperature: float) -> None:
    found = distribution(torch.tensor([-9.0, 4.0, 3.0]), Sampling(temperature=temperature, top_p=1))
    wanted = [0.0, 1.0, 0.0] if temperature < 1 else [1 / 3] * 3
    assert found.tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_diverged_model_is_said_to_be_one(value: float, temperature: float) -> None:
    with pytest.raises(UserError, match="not finite"):
        distribution(torch.tensor([0.0, value]), Sampling(temperature=temperature))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"min_p": 1.1}, "min_p=1.1"),
        ({"min_p": math.nan}, "min_p=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_p": math.nan}, "top_p=nan"),
    ],
)
def test_impossible_settings_are_refused(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Sampling(**values)
