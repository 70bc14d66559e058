"""Where the layer pattern is cut into pipeline segments."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

from nemotron3_megatron.config.recipe import ModelConfig
from nemotron3_megatron.config.sizes import KINDS, forward_flops, mtp_flops, output_flops


def cut_pattern(pattern: str, segments: int, costs: Sequence[int], *, tail: int = 0) -> str:
    """Cut a pattern into contiguous segments whose largest cost is as small as possible.

    Dynamic programming over (first layer, number of segments left). Among cuts with the same largest cost the one
    that looks most even (sum of squares) from the back is taken, so the result is deterministic.

    Args:
        pattern: one symbol a layer.
        segments: number of pieces, each of at least one layer.
        costs: cost of each layer.
        tail: cost that comes with the last segment whatever its layers (output layer and MTP).

    Returns:
        The pattern with ``|`` between segments.

    Raises:
        ValueError: fewer layers than segments, or not one cost a layer.
    """
    layers = len(pattern)
    if len(costs) != layers or not 1 <= segments <= layers:
        raise ValueError(f"cannot cut {layers} layers with {len(costs)} costs into {segments} segments")
    before = list(accumulate(costs, initial=0))
    # best[start]: (largest cost, sum of squared costs, first layer of the next segment) for layers start.. to the end
    best = [_Cut((cost := before[-1] - before[start] + tail), cost**2, layers) for start in range(layers)]
    table = [best]
    for count in range(2, segments + 1):
        last_start = layers - count
        best = [_best_cut(before, best, start, last_start + 1) for start in range(last_start + 1)]
        table.append(best)
    pieces, start = [], 0
    for row in reversed(table):
        pieces.append(pattern[start : row[start].end])
        start = row[start].end
    return "|".join(pieces)


class _Cut(NamedTuple):
    largest: int
    squares: int
    end: int


def _best_cut(before: Sequence[int], rest: Sequence[_Cut], start: int, last_end: int) -> _Cut:
    """The best end of the segment that begins at ``start``, when ``rest`` holds the best cuts after it."""
    cuts = []
    for end in range(start + 1, last_end + 1):
        cost = before[end] - before[start]
        cuts.append(_Cut(max(cost, rest[end].largest), cost**2 + rest[end].squares, end))
    return min(cuts)


@lru_cache(maxsize=128)
def hybrid_layer_pattern(model: ModelConfig, segments: int, seq_length: int) -> str:
    """Megatron's pattern: the main stack cut by forward FLOPs, then one ``/`` part for each MTP depth.

    The embedding is a look-up and costs nothing; the output layer and MTP weigh on the last segment, where
    Megatron-Core places them.
    """
    costs = [forward_flops(model, KINDS[symbol], seq_length) for symbol in model.pattern]
    tail = output_flops(model) + mtp_flops(model, seq_length)
    main = cut_pattern(model.pattern, segments, costs, tail=tail)
    return "/".join([main, *[model.mtp_pattern] * model.mtp_depths])
