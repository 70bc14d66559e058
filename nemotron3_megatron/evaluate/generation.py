"""Generation: blocks of tokens go through the model, the cache keeps what they leave, new tokens come out.

A round is one pass of the main model over the newest token of every row and, with speculation, the tokens drafted
after it. It yields one token more than drafts are accepted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.evaluate.decoder import PREFILL_COLUMNS, Decoder
from nemotron3_megatron.evaluate.drafter import Drafter
from nemotron3_megatron.evaluate.sampling import Sampling, distribution, draw, one_hot
from nemotron3_megatron.evaluate.speculation import verify
from nemotron3_megatron.evaluate.thinking import ThinkingBudget
from nemotron3_megatron.model.hybrid import Nemotron3Model


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """What may follow, and when a row ends.

    Raises:
        UserError: no token is to be generated, or a negative number drafted.
    """

    sampling: Sampling
    vocabulary: int
    """Entries of the tokenizer, which the model's vocabulary may exceed: no other token is drawn."""
    eod: int | None
    """Ends a row; None: nothing but ``max_new_tokens`` does."""
    max_new_tokens: int
    draft: int = 0
    """Tokens drafted by multi-token prediction in each round; 0: ordinary decoding."""
    thinking: ThinkingBudget | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            what = f"max_new_tokens={self.max_new_tokens}"
            raise UserError(what, why="nothing is to be generated", nearest="max_new_tokens=1")
        if self.draft < 0:
            raise UserError(f"draft={self.draft}", why="is negative", nearest="draft=0 (no speculation)")

    def next(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        """The distribution (vocabulary,) of the token after those generated; logits (V,)."""
        logits = logits[: self.vocabulary]
        forced = None if self.thinking is None else self.thinking.forced(generated)
        return distribution(logits, self.sampling) if forced is None else one_hot(forced, logits)

    def cut(self, generated: Sequence[int], new: Sequence[int]) -> tuple[int, ...]:
        """New tokens up to the end of the row, the EOD included."""
        room = new[: self.max_new_tokens - len(generated)]
        return tuple(room[: room.index(self.eod) + 1] if self.eod in room else room)

    def ended(self, generated: Sequence[int]) -> bool:
        """Whether a row is complete."""
        return len(generated) >= self.max_new_tokens or (bool(generated) and generated[-1] == self.eod)


@dataclass(frozen=True, slots=True)
class Round:
    """What one pass of the main model gave."""

    new: tuple[tuple[int, ...], ...]
    """Tokens of each row, the EOD included; none in a row that was complete before."""
    drafted: int
    """Drafts of each row."""
    accepted: tuple[int, ...]
    """Drafts accepted in each row that was not complete."""


@dataclass(slots=True)
class _Row:
    generator: torch.Generator
    generated: list[int] = field(default_factory=list)
    drafts: list[int] = field(default_factory=list)
    proposals: list[Tensor] = field(default_factory=list)
    """(V,) the distribution each draft was drawn from."""


@torch.no_grad()
def generate(
    model: Nemotron3Model, prompts: Sequence[Sequence[int]], rules: Rules, seeds: Sequence[int]
) -> Iterator[Round]:
    """Continue prompts of any lengths side by side.

    Args:
        model: whole, in evaluation mode.
        prompts: token ids, at least one each.
        rules: how tokens are chosen.
        seeds: of each row; a row's tokens depend on its own prompt and seed only (up to rounding).

    Raises:
        UserError: a prompt is empty, or the model cannot draft as asked.
    """
    if not all(prompts):
        raise UserError("prompt", why="is empty: there is nothing to continue", nearest="prompt='import '")
    decoder = Decoder(model, len(prompts))
    drafter = Drafter(model, len(prompts), rules.draft) if rules.draft else None
    rows = [_Row(torch.Generator().manual_seed(seed)) for _, seed in zip(prompts, seeds, strict=True)]
    device = model.output_layer.weight.device
    _prefill(decoder, drafter, prompts, device)
    block = torch.tensor([[prompt[-1]] for prompt in prompts], device=device)
    while not all(rules.ended(row.generated) for row in rows):
        hidden = decoder.advance(block, revocable=drafter is not None)
        followers = [_followers(row, values, rules) for row, values in zip(rows, decoder.logits(hidden), strict=True)]
        counts = [max(1, len(tokens)) for tokens in followers]
        new = tuple(rules.cut(row.generated, tokens) for row, tokens in zip(rows, followers, strict=True))
        yield Round(new, block.shape[1] - 1, tuple(len(tokens) - 1 for tokens in followers if tokens))
        for row, tokens in zip(rows, new, strict=True):
            row.generated += tokens
        newest = torch.tensor([[tokens[-1] if tokens else 0] for tokens in followers], device=device)
        block = newest
        if drafter is not None:
            decoder.stack.commit(counts)
            block = torch.cat([newest, _drafts(drafter, hidden, rows, followers, counts, rules)], dim=1)


def acceptance_length(rounds: Iterable[Round]) -> float | None:
    """Tokens a round gave on average (accepted drafts and one more), over rounds that had drafts; None: none had."""
    lengths = [accepted + 1 for each in rounds if each.drafted for accepted in each.accepted]
    return sum(lengths) / len(lengths) if lengths else None


def _prefill(decoder: Decoder, drafter: Drafter | None, prompts: Sequence[Sequence[int]], device: torch.device) -> None:
    """All but each prompt's last token, padded in front: the rows end together."""
    longest = max(map(len, prompts))
    padded = [[0] * (longest - len(prompt)) + list(prompt) for prompt in prompts]
    tokens = torch.tensor(padded, device=device)
    starts = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    exists = torch.arange(longest, device=device) >= starts[:, None]
    equal = len(set(map(len, prompts))) == 1
    for start in range(0, longest - 1, PREFILL_COLUMNS):
        end = min(start + PREFILL_COLUMNS, longest - 1)
        valid = None if equal else exists[:, start:end]
        hidden = decoder.advance(tokens[:, start:end], valid)
        if drafter is not None:
            drafter.absorb(hidden, tokens[:, start + 1 : end + 1], valid)


def _followers(row: _Row, logits: Tensor, rules: Rules) -> list[int]:
    """Accepted drafts and one token more, from logits (1 + drafts, V); nothing in a complete row."""
    if rules.ended(row.generated):
        return []

    def target(place: int) -> Tensor:
        return rules.next(logits[place], row.generated + row.drafts[:place])

    return verify(row.drafts, row.proposals, target, row.generator)


def _drafts(
    drafter: Drafter,
    hidden: Tensor,
    rows: Sequence[_Row],
    followers: Sequence[Sequence[int]],
    counts: Sequence[int],
    rules: Rules,
) -> Tensor:
    """(B, D) drafts of the next round; each row keeps its own with what they were drawn from."""
    following = torch.zeros(hidden.shape[1], hidden.shape[0], dtype=torch.long, device=hidden.device)
    for row, tokens in enumerate(followers):
        following[row, : len(tokens)] = torch.tensor(tokens, device=hidden.device)
        rows[row].drafts, rows[row].proposals = [], []

    def choose(number: int, logits: Tensor) -> int:
        row = rows[number]
        if rules.ended(row.generated):
            return 0
        proposal = rules.next(logits, row.generated + row.drafts)
        row.proposals.append(proposal)
        row.drafts.append(draw(proposal, row.generator))
        return row.drafts[-1]

    return drafter.draft(hidden, counts, following, choose)
