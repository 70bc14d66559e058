"""How many logits exist at a time; imports no torch, since planning asks too."""

from __future__ import annotations

LOGITS_BYTES = 4 * 2**30
"""Logits of more tokens than fit here are made in parts, and anew for their gradient: a third more products in the
output layer, which is small beside the layers at such lengths (131,072 logits in BF16: more than 16,384 tokens)."""

_ROWS = 128
"""Parts have a multiple of so many rows, for the matrix product."""


def rows_at_a_time(rows: int, logits_a_row: int, value_bytes: int, limit_bytes: int = LOGITS_BYTES) -> int:
    """Rows of each part: all of them where their logits fit the limit."""
    if rows * logits_a_row * value_bytes <= limit_bytes:
        return max(rows, 1)
    return max(limit_bytes // (logits_a_row * value_bytes) // _ROWS * _ROWS, _ROWS)
