"""From logits to the next token: temperature and truncation of the distribution, with an explicit generator."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nemotron3_megatron.config.errors import UserError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn: temperature first, then every truncation on what the one before it left.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 0.8
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from this many most likely tokens; 0: all."""
    top_p: float = 0.95
    """Draw from the fewest most likely tokens that hold at least this share of the probability."""
    min_p: float = 0.0
    """Draw from tokens at least this many times as likely as the most likely one."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise UserError(f"temperature={self.temperature}", why="is negative", nearest="temperature=0 (greedy)")
        if self.top_k < 0:
            raise UserError(f"top_k={self.top_k}", why="is negative", nearest="top_k=0 (all tokens)")
        if not 0 < self.top_p <= 1:
            nearest = "top_p=1 (all tokens)" if self.top_p > 1 else "temperature=0 (greedy)"
            raise UserError(f"top_p={self.top_p}", why="is not a share in (0, 1]", nearest=nearest)
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p={self.min_p}", why="is not in [0, 1]", nearest="min_p=0 (all tokens)")


def distribution(logits: Tensor, sampling: Sampling) -> Tensor:
    """The distribution a token is drawn from.

    Args:
        logits: (V,) floating point.
        sampling: temperature and truncation.

    Returns:
        (V,) float64 on the same device, sums to 1; one-hot when greedy, at the lowest of equally likely tokens.

    Raises:
        UserError: logits are not finite: the model has diverged.
    """
    if not bool(logits.isfinite().all()):
        raise UserError("checkpoint", why="its model computes logits that are not finite", nearest="an earlier one")
    if sampling.temperature == 0:
        return one_hot(int(logits.argmax()), logits)
    below = logits.double() - logits.double().max()  # at most 0: no temperature is too small to divide by
    return truncated(torch.softmax(below / sampling.temperature, dim=-1), sampling)


def one_hot(token: int, like: Tensor) -> Tensor:
    """All probability on one token: (V,) float64."""
    probabilities = torch.zeros_like(like, dtype=torch.float64)
    probabilities[token] = 1
    return probabilities


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """A token id from a distribution (V,); a certain one leaves the CPU generator as it is."""
    likeliest = int(probabilities.argmax())
    if probabilities[likeliest] >= 1:
        return likeliest
    return int(torch.multinomial(probabilities.cpu(), 1, generator=generator))


def truncated(probabilities: Tensor, sampling: Sampling) -> Tensor:
    """A distribution (V,) over its most likely tokens only: ``top_k``, ``top_p`` (Holtzman et al. 2020), ``min_p``.

    At least one token is kept; of equally likely ones the lowest are.
    """
    if not sampling.top_k and sampling.top_p == 1 and not sampling.min_p:
        return probabilities
    kept, tokens = probabilities.sort(descending=True, stable=True)
    if sampling.top_k:
        kept[sampling.top_k :] = 0
    if sampling.top_p < 1:
        kept = kept / kept.sum()
        kept[kept.cumsum(0) - kept >= sampling.top_p] = 0
    kept[kept < sampling.min_p * kept[0]] = 0
    return torch.zeros_like(probabilities).scatter_(0, tokens, kept / kept.sum())
