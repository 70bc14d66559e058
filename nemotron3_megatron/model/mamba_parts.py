"""Mamba-2's mixing for some of its groups at a time: groups, with their heads, do not see each other."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


class MixWeights(NamedTuple):
    """What the mixing of h heads with head_dim p, g groups and state n takes besides its input."""

    conv_weight: Tensor
    """(h * p + 2 * g * n, width)."""
    conv_bias: Tensor | None
    """(h * p + 2 * g * n,)."""
    dt_bias: Tensor
    """(h,)."""
    A: Tensor
    """(h,)."""
    D: Tensor
    """(h,) or (h, p)."""


def mix_in_parts(
    mix: Callable[[Tensor, MixWeights], Tensor], zxbcdt: Tensor, weights: MixWeights, parts: int, head_dim: int
) -> Tensor:
    """``mix(zxbcdt, weights)``, made of ``parts`` calls, each recomputed in the backward pass.

    Args:
        mix: from (b, s, 2 * h * p + 2 * g * n + h) and weights to (b, s, h * p), for any number of groups.
        zxbcdt: z, x, B, C and dt, in this order.
        weights: of all heads.
        parts: a divisor of g.
        head_dim: p.
    """
    if parts == 1:
        return mix(zxbcdt, weights)
    heads = weights.A.shape[0]
    inner = heads * head_dim
    group_width = (zxbcdt.shape[-1] - 2 * inner - heads) // 2
    # One split: its backward writes the whole gradient once.
    pieces = _split(zxbcdt, (inner, inner, group_width, group_width, heads), parts)
    convolved = (inner, group_width, group_width)
    rows = _split(weights.conv_weight.t(), convolved, parts)
    biases = None if weights.conv_bias is None else _split(weights.conv_bias, convolved, parts)
    outputs = []
    for part in range(parts):
        own = MixWeights(
            torch.cat(rows[part], dim=-1).t().contiguous(),
            None if biases is None else torch.cat(biases[part]),
            *(vector.chunk(parts)[part] for vector in weights[2:]),
        )

        def run(*columns: Tensor, own: MixWeights = own) -> Tensor:
            return mix(torch.cat(columns, dim=-1), own)

        outputs.append(checkpoint(run, *pieces[part], use_reentrant=False, preserve_rng_state=False))
    return torch.cat(outputs, dim=-1)


def _split(whole: Tensor, widths: tuple[int, ...], parts: int) -> list[tuple[Tensor, ...]]:
    """Columns of each part, in the order of ``widths``, each of which is divided evenly among the parts."""
    sizes = [width // parts for width in widths for _ in range(parts)]
    columns = torch.split_with_sizes(whole, sizes, dim=-1)
    return [columns[part::parts] for part in range(parts)]
