"""When a layer works on a long sequence in parts; imports no torch, since planning asks too."""

from __future__ import annotations

EXPERT_BYTES = 8 * 2**30
"""Tokens whose rows for the experts (their inputs, hidden values and weighted hidden values) fill more than this on a
rank go through the experts in parts, each recomputed in the backward pass."""

LARGEST_INDEX = 2**31 - 1
"""mamba-ssm 2.3's Triton kernels address elements with 32-bit integers (``ops/triton/ssd_*.py`` and
``layernorm_gated.py`` multiply program ids and strides without widening); beyond it they read and write elsewhere."""


def expert_bytes(topk: int, width: int, hidden: int, value_bytes: int) -> int:
    """Bytes of a token's rows in its ``topk`` experts: their input (``width``), hidden values and weighted ones."""
    return topk * (width + 2 * hidden) * value_bytes


def tokens_at_a_time(tokens: int, bytes_a_token: int, limit_bytes: int = EXPERT_BYTES) -> int:
    """Tokens of each part, the parts as equal as can be; all tokens where they fit the limit."""
    parts = max(-(-tokens * bytes_a_token // limit_bytes), 1)
    return -(-tokens // parts)


def scan_parts(
    positions: int, width: int, inner: int, state: int, groups: int, chunk_size: int, limit: int = LARGEST_INDEX
) -> int:
    """Into how many parts the groups of a fused Mamba-2 scan go, so that the kernels' indices reach.

    Args:
        positions: in all sequences of the micro-batch.
        width: of the input projection's output.
        inner: heads * head_dim.
        state: size of a head's state.
        groups: of B and C; parts are of whole groups.
        chunk_size: positions in a chunk, each of which has a state.
        limit: largest index.

    Returns:
        A divisor of ``groups``.

    Raises:
        ValueError: one group alone is too large.
    """
    elements = max(positions * width, -(-positions // chunk_size) * inner * state)
    for parts in range(1, groups + 1):
        if groups % parts == 0 and elements <= parts * limit:
            return parts
    raise ValueError(
        f"{positions:,} positions of {width:,} values are more than the fused scan can address with {groups} groups; "
        "more context or tensor parallelism makes them fewer"
    )
