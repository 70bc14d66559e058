"""Generated tokens against choosing one token at a time from the model's own forward over the whole context."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.generation import Round, Rules, acceptance_length, generate
from nemotron3_megatron.evaluate.sampling import Sampling
from nemotron3_megatron.evaluate.thinking import ThinkingBudget
from nemotron3_megatron.model.hybrid import Nemotron3Model

GREEDY = Sampling(temperature=0)
# An untrained model's drafts are right by chance: often enough with few tokens to choose from.
FEW = 3
PROMPTS = ([5, 9, 1, 60, 33, 2, 7], [4], [8, 8, 63])


def _rules(**values: Any) -> Rules:
    return Rules(**({"sampling": GREEDY, "vocabulary": FEW, "eod": None, "max_new_tokens": 24} | values))


def _generated(model: Nemotron3Model, rules: Rules, prompts: Sequence[list[int]] = PROMPTS) -> list[list[int]]:
    rounds = list(generate(model, prompts, rules, range(len(prompts))))
    return [[token for each in rounds for token in each.new[row]] for row in range(len(prompts))]


@torch.no_grad()
def _one_by_one(model: Nemotron3Model, prompt: list[int], rules: Rules) -> list[int]:
    tokens = list(prompt)
    for _ in range(rules.max_new_tokens):
        tokens.append(int(model(torch.tensor([tokens]), None)[0, -1, : rules.vocabulary].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("draft", [0, 1, 2])
def test_greedy_tokens_are_those_of_the_whole_context(exact: Nemotron3Model, draft: int) -> None:
    rules = _rules(draft=draft)
    expected = [_one_by_one(exact, prompt, rules) for prompt in PROMPTS]
    assert _generated(exact, rules) == expected
    assert [_generated(exact, rules, [prompt])[0] for prompt in PROMPTS] == expected
    assert any(len(set(tokens)) > 1 for tokens in expected)


def test_drafts_save_passes_and_the_acceptance_length_says_how_many(exact: Nemotron3Model) -> None:
    rounds = list(generate(exact, PROMPTS[:1], _rules(draft=2), [0]))
    length = acceptance_length(rounds)
    assert rounds[0].drafted == 0  # nothing is drafted before the first pass
    assert [each.drafted for each in rounds[1:]] == [2] * (len(rounds) - 1)
    assert length is not None
    assert 1 < length <= 3
    tokens = sum(each.accepted[0] + 1 for each in rounds)
    assert tokens - sum(len(each.new[0]) for each in rounds) in (0, 1, 2)  # the last pass may go over the end
    assert length == (tokens - 1) / (len(rounds) - 1)
    assert len(rounds) < 24
    assert acceptance_length(generate(exact, PROMPTS, _rules(), range(3))) is None


def test_acceptance_is_averaged_over_rows_that_go_on() -> None:
    rounds = [Round(((1,), (1,)), 0, (0, 0)), Round(((1, 2, 3), (4,)), 2, (2, 0)), Round(((5, 6), ()), 2, (1,))]
    assert acceptance_length(rounds) == (3 + 1 + 2) / 3


def _probabilities(model: Nemotron3Model, rules: Rules, prompt: list[int]) -> torch.Tensor:
    """Of every sequence of ``max_new_tokens`` tokens, in lexicographic order; by the chain rule."""
    sequences = list(itertools.product(range(FEW), repeat=rules.max_new_tokens))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + list(tokens) for tokens in sequences]), None)[..., :FEW]
    steps = torch.softmax(logits / rules.sampling.temperature, dim=-1)[:, len(prompt) - 1 : -1]
    return steps.gather(2, torch.tensor(sequences)[..., None])[..., 0].prod(dim=1)


def _chi_square_tail(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """Probability of counts at least this far from their expectation (Pearson; rare cells are joined)."""
    order = probabilities.argsort()
    expected, observed = (probabilities * counts.sum())[order], counts[order].double()
    small = int((expected.cumsum(0) < 10).sum()) + 1
    expected, observed = (torch.cat([t[:small].sum()[None], t[small:]]) for t in (expected, observed))
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2).double(), statistic / 2))


def test_texts_sampled_with_drafts_have_the_models_probabilities(exact: Nemotron3Model) -> None:
    # 1,200 texts of 3 tokens, 27 outcomes. A tail below 1e-4 fails (a statistic above 61 at 26 degrees of freedom): by
    # chance once in 10,000 seeds. Another distribution p' has a non-central statistic with
    # lambda = 1200 sum((p' - p)^2 / p): one that is 25 % off in every outcome has lambda = 75, a mean of 101 and a
    # deviation of 19, and is found with a power of 98 %.
    rules = _rules(sampling=Sampling(temperature=2.0, top_p=1.0), max_new_tokens=3, draft=2)
    rows, prompt = 200, [5, 9, 1]
    counts = torch.zeros(FEW**3)
    accepted = []
    for seed in range(0, 1200, rows):
        rounds = list(generate(exact, [prompt] * rows, rules, range(seed, seed + rows)))
        accepted += [number for each in rounds[1:] for number in each.accepted]
        for row in range(rows):
            tokens = [token for each in rounds for token in each.new[row]]
            counts[sum(token * FEW ** (2 - place) for place, token in enumerate(tokens))] += 1
    assert _chi_square_tail(counts, _probabilities(exact, rules, prompt)) > 1e-4
    assert set(accepted) == {0, 1, 2}


def test_a_rows_tokens_depend_on_its_own_prompt_and_seed(exact: Nemotron3Model) -> None:
    rules = _rules(sampling=Sampling(temperature=2.0), draft=1, vocabulary=64)

    def texts(prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        rounds = list(generate(exact, prompts, rules, seeds))
        return [[token for each in rounds for token in each.new[row]] for row in range(len(seeds))]

    together = texts([PROMPTS[0], PROMPTS[0], PROMPTS[2]], [3, 4, 3])
    assert together[0] != together[1]
    assert texts([PROMPTS[0]], [4])[0] == together[1]
    assert texts([PROMPTS[2]], [3])[0] == together[2]


@pytest.mark.parametrize("draft", [0, 2])
def test_a_row_ends_at_the_eod_and_others_go_on(exact: Nemotron3Model, draft: int) -> None:
    whole = _generated(exact, _rules(draft=draft))
    eod = whole[0][3]
    for tokens, cut in zip(whole, _generated(exact, _rules(draft=draft, eod=eod)), strict=True):
        assert cut == (tokens[: tokens.index(eod) + 1] if eod in tokens else tokens)
    lengths = {len(tokens) for tokens in _generated(exact, _rules(draft=draft, max_new_tokens=5))}
    assert lengths == {5}


@pytest.mark.parametrize("draft", [0, 2])
@pytest.mark.parametrize("length", [1, 3])
def test_the_thought_is_closed_when_its_budget_is_spent(exact: Nemotron3Model, draft: int, length: int) -> None:
    free = _one_by_one(exact, PROMPTS[0], _rules(vocabulary=64))
    end = tuple(token for token in range(64) if token not in free)[:length]  # the model would not write them
    rules = _rules(draft=draft, vocabulary=64, thinking=ThinkingBudget(7, end))
    (tokens,) = _generated(exact, rules, PROMPTS[:1])
    assert tokens[:7] == free[:7]
    assert tuple(tokens[7 : 7 + len(end)]) == end
    after = _one_by_one(exact, PROMPTS[0] + tokens[: 7 + len(end)], rules)
    assert tokens[7 + len(end) :] == after[: 24 - 7 - len(end)]


@pytest.mark.parametrize(
    ("values", "message"), [({"max_new_tokens": 0}, "max_new_tokens=0"), ({"draft": -1}, "draft=-1")]
)
def test_impossible_rules_are_refused(values: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        _rules(**values)


def test_an_empty_prompt_is_refused(exact: Nemotron3Model) -> None:
    with pytest.raises(UserError, match="prompt"):
        next(generate(exact, [[1], []], _rules(), [0, 1]))
