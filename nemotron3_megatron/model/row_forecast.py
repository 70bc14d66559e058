"""Room for rows whose number the GPU knows and the CPU does not yet."""

from __future__ import annotations

import math

MARGIN = 1 / 16
"""More than the largest share of late."""
FADES = 63 / 64
"""Of the remembered share, with each pass."""
ROUNDED_TO = 256
"""Rows: few sizes let torch's allocator use its blocks again; and there is room for a row where none is foretold."""


class RowForecast:
    """How many rows the experts of one layer on this rank will get, from what they got before.

    It decides what is allocated, never what is computed.
    """

    def __init__(self, rows_per_token: float) -> None:
        """``rows_per_token``: of a rank's tokens, to begin with; top-k where routing is balanced."""
        self._rows_per_token = rows_per_token

    def room(self, tokens: int) -> int:
        """Rows to make room for, of so many tokens a rank."""
        expected = tokens * self._rows_per_token * (1 + MARGIN)
        return ROUNDED_TO * max(math.ceil(expected / ROUNDED_TO), 1)

    def learn(self, rows: int, tokens: int) -> None:
        """There were so many rows of so many tokens a rank."""
        self._rows_per_token = max(rows / tokens, self._rows_per_token * FADES)
