"""``nemotron3 generate``: continue a prompt with a trained checkpoint.

Every token is computed from the whole context (no cache), which costs O(n^2) layer evaluations for n tokens:
made for looking at small models, not for serving.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.evaluate.sampling import Sampling, next_token
from nemotron3_megatron.evaluate.trained import Trained, trained


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``nemotron3 generate`` takes, as ``key=value``."""

    checkpoint: Path
    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_p: float = 0.95
    seed: int = 0
    tokenizer: str | None = None
    """None: the one named in the run."""


_TEXTS = ("checkpoint", "prompt", "tokenizer")
"""Options that are never read as numbers."""


def generate_main(overrides: Sequence[str]) -> int:
    """Print the prompt (dim on a terminal) and its continuation.

    Raises:
        UserError: an option, the checkpoint or the prompt cannot be used.
    """
    options = read_options(overrides)
    sampling = Sampling(temperature=options.temperature, top_p=options.top_p)
    with trained(options.checkpoint, options.tokenizer) as model:
        text = complete(model, options.prompt, sampling, max_new_tokens=options.max_new_tokens, seed=options.seed)
    console = Console(soft_wrap=True)
    console.print(Text().append(options.prompt, "dim").append(text), highlight=False)
    return 0


@torch.no_grad()
def complete(model: Trained, prompt: str, sampling: Sampling, *, max_new_tokens: int, seed: int) -> str:
    """The text a model writes after ``prompt``, up to the end of the document or ``max_new_tokens`` tokens.

    The same seed gives the same text (up to the rounding of the device).

    Raises:
        UserError: the prompt holds no token, or ``max_new_tokens`` is not positive.
    """
    if max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens={max_new_tokens}", why="nothing is to be generated", nearest="max_new_tokens=1"
        )
    tokens = model.tokenizer.encode(prompt)
    if not tokens:
        raise UserError("prompt", why="is empty: there is nothing to continue", nearest="prompt='import '")
    start = len(tokens)
    generator = torch.Generator().manual_seed(seed)
    while len(tokens) < start + max_new_tokens:
        token = next_token(_logits(model, tokens), sampling, generator)
        if token == model.tokenizer.eod:
            break
        tokens.append(token)
    return continuation(model, tokens, start)


def continuation(model: Trained, tokens: Sequence[int], start: int) -> str:
    """Text of the tokens from ``start`` on, decoded with those before (a character may span tokens)."""
    whole, before = model.tokenizer.decode(tokens), model.tokenizer.decode(tokens[:start])
    return whole.removeprefix(before)


def read_options(overrides: Sequence[str]) -> Options:
    """Parse ``key=value`` words.

    Raises:
        UserError: a word has another form or is given twice, or a key or value is not legal.
    """
    values: dict[str, object] = {}
    for word in overrides:
        key, found, value = word.partition("=")
        if not found:
            raise UserError(word, where="command line", why="is not key=value", nearest=f"prompt={word}")
        if key in values:
            raise UserError(word, where="command line", why=f"{key} is given twice")
        values[key] = value if key in _TEXTS else _number(value)
    options = typed(Options, values, "", lambda _: "command line")
    assert isinstance(options, Options)
    return options


def _logits(model: Trained, tokens: Sequence[int]) -> torch.Tensor:
    """Logits (V,) of the token that follows; V is the tokenizer's, which the model's vocabulary may exceed."""
    context = torch.tensor([tokens], device=model.device)
    positions = torch.arange(len(tokens), device=model.device)[None]
    logits: torch.Tensor = model.model(context, positions)
    return logits[0, -1, : model.tokenizer.vocab_size].float()


def _number(text: str) -> object:
    """An integer or a float where the text is one; else the text, for ``typed`` to refuse."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
