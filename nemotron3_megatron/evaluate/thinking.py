"""A budget of thinking tokens: when it is spent, the model is made to close its thought and answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from nemotron3_megatron.config.errors import UserError


@dataclass(frozen=True, slots=True)
class ThinkingBudget:
    """At most ``tokens`` generated tokens before the end-of-thinking tokens, which are then appended.

    Raises:
        UserError: the budget is negative, or there are no tokens to end it with.
    """

    tokens: int
    end: tuple[int, ...]
    """What ends the thought: one special token, or several where the tokenizer has none."""

    def __post_init__(self) -> None:
        if self.tokens < 0:
            raise UserError(f"think_budget={self.tokens}", why="is negative", nearest="think_budget=0 (no thinking)")
        if not self.end:
            raise UserError("end_think", why="is empty: nothing would end the thought", nearest="end_think='</think>'")

    def forced(self, generated: Sequence[int]) -> int | None:
        """The token that must come next after those ``generated`` so far; None: the model's choice.

        The thought is open from the first generated token until ``end`` was generated.
        """
        place = len(generated) - self.tokens
        if not 0 <= place < len(self.end) or _contains(generated[: self.tokens], self.end):
            return None
        return self.end[place]


def _contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    starts = range(len(tokens) - len(part) + 1)
    return any(tuple(tokens[start : start + len(part)]) == tuple(part) for start in starts)
