"""``nemotron3 generate``: continue a prompt with a trained checkpoint, printing the text as it comes."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.text import Text

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.typed import typed
from nemotron3_megatron.config.words import key_values
from nemotron3_megatron.data.tokenizer import Tokenizer
from nemotron3_megatron.evaluate.generation import Round, Rules, acceptance_length, generate
from nemotron3_megatron.evaluate.sampling import Sampling
from nemotron3_megatron.evaluate.text import TextStream
from nemotron3_megatron.evaluate.thinking import ThinkingBudget
from nemotron3_megatron.evaluate.trained import Trained, trained

END_THINK = "</think>"
MAX_SEED = 2**63 - 1
"""Of torch's generators."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What ``nemotron3 generate`` takes, as ``key=value``."""

    checkpoint: Path
    prompt: str
    max_new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    min_p: float = 0.0
    seed: int = 0
    samples: int = 1
    """Continuations, generated side by side; sample n has the seed ``seed + n``."""
    stop_at_eod: bool = True
    draft: int = 0
    """Tokens drafted by multi-token prediction in each pass of the model; 0: none."""
    think_budget: int | None = None
    """Generated tokens after which ``end_think`` is appended, if the model has not written it; None: no limit."""
    end_think: str | None = None
    """The token that ends the thought, by name or id; None: ``</think>``. A text that is no token is appended as its
    tokens."""
    tokenizer: str | None = None
    """None: the one named in the run, or in the directory of a Hugging Face model."""
    recipe: str | None = None
    """Of a Hugging Face model: the recipe that describes it."""

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise UserError(f"samples={self.samples}", why="nothing is to be generated", nearest="samples=1")
        if not 0 <= self.seed <= MAX_SEED - self.samples + 1:
            raise UserError(f"seed={self.seed}", why=f"seeds are 0 to {MAX_SEED:,}", nearest="seed=0")
        if self.end_think is not None and self.think_budget is None:
            raise UserError(f"end_think={self.end_think}", why="ends a thought with a budget", nearest="think_budget=N")
        for name, text in (("prompt", self.prompt), ("end_think", self.end_think or "")):
            if not _is_unicode(text):
                raise UserError(name, where="command line", why="is not UTF-8")
        _ = self.sampling  # its ranges, before a model is read

    @property
    def sampling(self) -> Sampling:
        """How tokens are drawn."""
        return Sampling(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)


def _is_unicode(text: str) -> bool:
    """False for bytes of the command line that Python could not decode (PEP 383)."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


_TEXTS = ("checkpoint", "prompt", "tokenizer", "end_think", "recipe")
"""Options that are never read as numbers."""


def generate_main(overrides: Sequence[str]) -> int:
    """Print the prompt (dim on a terminal) and its continuation as it comes; on stderr, how fast it came.

    Several continuations are printed when all are complete.

    Raises:
        UserError: an option, the checkpoint or the prompt cannot be used.
    """
    options = read_options(overrides)
    console = Console(soft_wrap=True, highlight=False)
    seeds = range(options.seed, options.seed + options.samples)
    rounds: list[Round] = []
    texts = [""] * options.samples
    with trained(options.checkpoint, options.tokenizer, recipe=options.recipe, spec="torch") as model:
        started = perf_counter()
        for each, pieces in continued(model, options.prompt, rules_of(options, model.tokenizer), seeds):
            if options.samples == 1:
                _show(console, "" if rounds else options.prompt, pieces[0])
            rounds.append(each)
            texts = [text + piece for text, piece in zip(texts, pieces, strict=True)]
        seconds = perf_counter() - started
    if options.samples == 1:
        console.print()
    else:
        for seed, text in zip(seeds, texts, strict=True):
            console.print(Text(f"seed {seed}", "bold"))
            _show(console, options.prompt, f"{text}\n")
    sys.stderr.write(summary(rounds, seconds) + "\n")
    return 0


def _show(console: Console, prompt: str, text: str) -> None:
    """The prompt dim on a terminal; into a file every character as it is (rich replaces tabs and drops others)."""
    if console.is_terminal:
        console.print(Text(prompt, "dim").append(Text(text)), end="")
    else:
        console.file.write(prompt + text)
        console.file.flush()


def complete(model: Trained, prompt: str, sampling: Sampling, *, max_new_tokens: int, seed: int) -> str:
    """The text a model writes after ``prompt``, up to the end of the document or ``max_new_tokens`` tokens.

    The same seed gives the same text (up to the rounding of the device).

    Raises:
        UserError: the prompt holds no token, or ``max_new_tokens`` is not positive.
    """
    tokenizer = model.tokenizer
    rules = Rules(sampling=sampling, vocabulary=tokenizer.vocab_size, eod=tokenizer.eod, max_new_tokens=max_new_tokens)
    return "".join(pieces[0] for _, pieces in continued(model, prompt, rules, [seed]))


def continued(
    model: Trained, prompt: str, rules: Rules, seeds: Sequence[int]
) -> Iterator[tuple[Round, tuple[str, ...]]]:
    """Continue a prompt once for each seed: every round with the text that it completed in each continuation."""
    tokens = model.tokenizer.encode(prompt)
    streams = [TextStream(model.tokenizer, tokens) for _ in seeds]
    counts = [0 for _ in seeds]
    for each in generate(model.model, [tokens] * len(seeds), rules, seeds):
        counts = [count + len(new) for count, new in zip(counts, each.new, strict=True)]
        last = [rules.max_new_tokens == count or rules.eod in new for count, new in zip(counts, each.new, strict=True)]
        yield each, tuple(stream.add(new, last=end) for stream, new, end in zip(streams, each.new, last, strict=True))


def rules_of(options: Options, tokenizer: Tokenizer) -> Rules:
    """The rules that options ask for, in tokens of a tokenizer.

    Raises:
        UserError: an option is out of its range.
    """
    thinking = None
    if options.think_budget is not None:
        thinking = ThinkingBudget(
            options.think_budget, token_ids(END_THINK if options.end_think is None else options.end_think, tokenizer)
        )
    return Rules(
        sampling=options.sampling,
        vocabulary=tokenizer.vocab_size,
        eod=tokenizer.eod if options.stop_at_eod else None,
        max_new_tokens=options.max_new_tokens,
        draft=options.draft,
        thinking=thinking,
    )


def token_ids(name: str, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The token with this name or this id, else the tokens of the text.

    Raises:
        UserError: the id is not in the vocabulary.
    """
    if name.isdecimal():
        if int(name) >= tokenizer.vocab_size:
            raise UserError(f"end_think={name}", why=f"the tokenizer has {tokenizer.vocab_size:,} entries")
        return (int(name),)
    token = tokenizer.token_id(name)
    return tuple(tokenizer.encode(name)) if token is None else (token,)


def summary(rounds: Sequence[Round], seconds: float) -> str:
    """How much came how fast, and how far drafts were right."""
    tokens = sum(len(new) for each in rounds for new in each.new)
    text = f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tokens/s"
    length = acceptance_length(rounds)
    if length is None:
        return text
    drafted = max(each.drafted for each in rounds)
    return f"{text}; {drafted} drafts a pass, acceptance length {length:.2f} of {drafted + 1}"


def read_options(overrides: Sequence[str]) -> Options:
    """Parse ``key=value`` words.

    Raises:
        UserError: a word has another form or is given twice, or a key or value is not legal.
    """
    words = key_values(overrides, nearest="prompt={word}")
    values = {key: value if key in _TEXTS else _value(value) for key, value in words.items()}
    options = typed(Options, values, "", lambda _: "command line")
    assert isinstance(options, Options)
    return options


def _value(text: str) -> object:
    """A truth value, an integer or a float where the text is one; else the text, for ``typed`` to refuse."""
    if text in ("true", "false"):
        return text == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
