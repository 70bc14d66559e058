"""When the end of a thought is forced."""

from __future__ import annotations

import pytest

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.thinking import ThinkingBudget

END = 13


def _written(budget: ThinkingBudget, own: list[int]) -> list[int]:
    """A text whose writer has tokens of its own in mind, as far as it is free."""
    text: list[int] = []
    while own:
        forced = budget.forced(text)
        text.append(own.pop(0) if forced is None else forced)
    return text


def test_the_end_is_appended_once_when_the_budget_is_spent() -> None:
    assert _written(ThinkingBudget(3, (END,)), [1, 2, 3, 4, 5, 6]) == [1, 2, 3, END, 4, 5, 6]
    assert _written(ThinkingBudget(0, (END,)), [1, 2]) == [END, 1, 2]
    assert _written(ThinkingBudget(2, (END, 14)), [1, 2, 3, 4]) == [1, 2, END, 14, 3, 4]
    assert _written(ThinkingBudget(9, (END,)), [1, 2, 3]) == [1, 2, 3]


def test_a_thought_that_ended_by_itself_is_left_alone() -> None:
    assert _written(ThinkingBudget(3, (END,)), [1, END, 3, 4, 5]) == [1, END, 3, 4, 5]
    assert _written(ThinkingBudget(3, (END,)), [1, 2, END, 4, 5]) == [1, 2, END, 4, 5]
    assert _written(ThinkingBudget(4, (END, 14)), [1, END, 14, 4, 5]) == [1, END, 14, 4, 5]
    assert _written(ThinkingBudget(4, (END, 14)), [END, 1, 14, END, 5]) == [END, 1, 14, END, END, 14, 5]


@pytest.mark.parametrize(("tokens", "end", "message"), [(-1, (END,), "think_budget=-1"), (3, (), "end_think")])
def test_impossible_budgets_are_refused(tokens: int, end: tuple[int, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ThinkingBudget(tokens, end)
