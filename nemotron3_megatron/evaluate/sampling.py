"""From logits to the next token: temperature and nucleus sampling with an explicit generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron3_megatron.config.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Raises:
        UserError: ``temperature`` is negative, or ``top_p`` is not in (0, 1].
    """

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_p: float = 0.95
    """Draw from the fewest most likely tokens that hold at least this share of the probability."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature}", why="is negative", nearest="temperature=0 (greedy)")
        if not 0 < self.top_p <= 1:
            nearest = "top_p=1 (all tokens)" if self.top_p > 1 else "temperature=0 (greedy)"
            raise UserError(f"top_p={self.top_p}", why="is not a share in (0, 1]", nearest=nearest)


def next_token(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw a token.

    Args:
        logits: (V,) floating point.
        sampling: temperature and nucleus.
        generator: on the CPU; advanced by one draw unless the choice is greedy.

    Returns:
        Its id; among equally likely ones the lowest when greedy.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities = torch.softmax(logits.double().cpu() / sampling.temperature, dim=-1)
    return int(torch.multinomial(nucleus(probabilities, sampling.top_p), 1, generator=generator))


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The distribution over the fewest most likely tokens that hold at least ``top_p`` (Holtzman et al. 2020).

    Args:
        probabilities: (V,), sums to 1.
        top_p: in (0, 1]; at least one token is always kept.

    Returns:
        (V,) with zeros outside the set; sums to 1.
    """
    if top_p >= 1:
        return probabilities
    ordered, tokens = probabilities.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.where(before < top_p, ordered, 0.0)
    chosen = torch.zeros_like(probabilities).scatter_(0, tokens, kept)
    return chosen / chosen.sum()
