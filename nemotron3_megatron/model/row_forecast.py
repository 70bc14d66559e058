"""Room for rows whose number the GPU knows and the CPU does not yet."""

from __future__ import annotations

import math

MARGIN = 1 / 16
"""More than the largest share of late, where more rows than room cost a second launch of the experts."""
CAPTURED_MARGIN = 1 / 2
"""The same at first in a CUDA graph, where they cost a step, and graphs made anew. A row that nobody uses costs memory,
and an activation's time."""
FADES = 63 / 64
"""Of the remembered share, with each pass."""
ROUNDED_TO = 256
"""Rows: few sizes let torch's allocator use its blocks again; and there is room for a row where none is foretold."""


class RowForecast:
    """How many rows the experts of one layer on this rank will get, from what they got before.

    It decides what is allocated, never what is computed.
    """

    def __init__(self, rows_per_token: float, most_per_token: float = math.inf) -> None:
        """Of each of a rank's tokens.

        Args:
            rows_per_token: to begin with; top-k where routing is balanced.
            most_per_token: what no batch exceeds.
        """
        self._rows_per_token = rows_per_token
        self._most_per_token = most_per_token
        self._captured_margin = CAPTURED_MARGIN

    def room(self, tokens: int, *, captured: bool = False) -> int:
        """Rows to make room for, of so many tokens a rank, now or in each replay of a CUDA graph."""
        margin = self._captured_margin if captured else MARGIN
        rows = tokens * min(self._rows_per_token * (1 + margin), self._most_per_token)
        return ROUNDED_TO * max(math.ceil(rows / ROUNDED_TO), 1)

    def learn(self, rows: int, tokens: int) -> None:
        """There were so many rows of so many tokens a rank."""
        self._rows_per_token = max(rows / tokens, self._rows_per_token * FADES)

    def widen(self) -> None:
        """A graph's room was too small: the next graph has twice the margin."""
        self._captured_margin *= 2
