"""The rejection rule alone, on distributions that are written down."""

from __future__ import annotations

import pytest
import torch

from nemotron3_megatron.evaluate.sampling import draw
from nemotron3_megatron.evaluate.speculation import verify

P = torch.tensor([[0.5, 0.3, 0.15, 0.05, 0.0], [0.1, 0.1, 0.2, 0.0, 0.6], [0.2, 0.2, 0.2, 0.2, 0.2]]).double()
PROPOSALS = {
    "far": torch.tensor([[0.1, 0.2, 0.1, 0.1, 0.5], [0.7, 0.1, 0.1, 0.1, 0.0]]).double(),
    "equal": P[:2],
    "one-hot": torch.eye(5).double()[:2],
}


@pytest.mark.parametrize("name", PROPOSALS)
def test_tokens_are_distributed_as_if_drawn_from_the_target(name: str) -> None:
    # 5,000 rounds. Each share has a standard deviation of at most sqrt(0.25 / n) where n rounds reach the place; six
    # of them are allowed (2e-9 a share by chance). At the first place that is 0.042, and a rule that draws from p after
    # a refusal is 0.13 off there in the first case: 18 standard deviations.
    q, rounds, generator = PROPOSALS[name], 5_000, torch.Generator().manual_seed(0)
    results = []
    for _ in range(rounds):
        drafts = [draw(each, generator) for each in q]
        results.append(verify(drafts, list(q), lambda place: P[place], generator))
    for place in range(3):
        reached = torch.tensor([tokens[place] for tokens in results if len(tokens) > place])
        if len(reached) < 500:
            continue
        shares = torch.bincount(reached, minlength=5) / len(reached)
        assert (shares - P[place]).abs().max() < 6 * (0.25 / len(reached)) ** 0.5
    accepted = sum(len(tokens) > 1 for tokens in results) / rounds
    expected = float(torch.minimum(P[0], q[0]).sum())  # corollary 3.6 of the paper
    assert abs(accepted - expected) < 6 * (0.25 / rounds) ** 0.5


def test_what_follows_is_asked_for_given_the_accepted_drafts_only() -> None:
    asked = []

    def target(place: int) -> torch.Tensor:
        asked.append(place)
        return torch.eye(5).double()[place]

    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    certain = [torch.eye(5).double()[token] for token in (0, 3, 2)]
    assert verify([0, 3, 2], certain, target, generator) == [0, 1]
    assert asked == [0, 1]
    assert torch.equal(generator.get_state(), before)  # greedy decoding uses no randomness
