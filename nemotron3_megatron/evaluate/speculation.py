"""Speculative sampling: drafts are accepted so that the tokens are distributed as if drawn one by one.

Leviathan, Kalman and Matias 2023 (arXiv:2211.17192, algorithm 1): a draft x from q is accepted with probability
min(1, p(x) / q(x)); at the first refusal the token is drawn from max(0, p - q), normalised. Both are distributions
after temperature and truncation; greedy ones are one-hot, for which the rule says: accept what is the most likely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nemotron3_megatron.evaluate.sampling import draw


def verify(
    drafts: Sequence[int], proposals: Sequence[Tensor], target: Callable[[int], Tensor], generator: torch.Generator
) -> list[int]:
    """The tokens that follow, one more than drafts are accepted.

    Args:
        drafts: tokens, each drawn from its proposal.
        proposals: q (V,) of each draft.
        target: p (V,) at place i, given that the drafts before i are accepted; i may be ``len(drafts)``.
        generator: on the CPU.
    """
    for place, (token, q) in enumerate(zip(drafts, proposals, strict=True)):
        p = target(place)
        ratio = float(p[token] / q[token])
        if ratio < 1 and (ratio == 0 or float(torch.rand((), generator=generator, dtype=torch.float64)) >= ratio):
            rest = (p - q).clamp(min=0)
            return [*drafts[:place], draw(rest / rest.sum(), generator)]
    return [*drafts, draw(target(len(drafts)), generator)]
