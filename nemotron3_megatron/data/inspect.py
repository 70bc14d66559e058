"""``nemotron3 data inspect``: what a recipe's data really is, before anything is trained on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.composition import blends_of, check_amounts, planned
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.data.made import warn_of_tokenizers
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer

_SHOWN_DOCUMENTS = 3
_SHOWN_TOKENS = 60
_PIPE_WIDTH = 140


@dataclass(frozen=True, slots=True)
class SourceFacts:
    """One source, over the whole run."""

    source: str
    tag: str
    documents: int
    tokens: int
    median_length: int
    longest: int
    read_tokens: int
    """Until the run's last step."""
    epochs: float
    share: float
    """Of all tokens that the run reads."""


@dataclass(frozen=True, slots=True)
class Share:
    """Of a source in a blend of a stage at one sequence length."""

    stage: str
    seq_length: int
    source: str
    share: float
    tokens: int


def inspect_main(overrides: Sequence[str], as_json: bool) -> int:
    """Print tables and samples of text, or JSON; draw the histograms of document lengths into the run directory.

    Raises:
        UserError: the recipe, a source or the tokenizer cannot be used; when all is shown: what training would refuse.
    """
    from nemotron3_megatron.config import check_data, compose, planned_world, resolve

    recipe, origins = compose(overrides)
    run = resolve(recipe, planned_world(recipe), origins)
    check_data(run)
    corpora = {name: IndexedTokens(run.data.sources[name].path, vocab_size=run.model.vocab_size) for name in used(run)}
    warn_of_tokenizers({name: run.data.sources[name] for name in corpora})
    facts = list(source_facts(run, corpora))
    if as_json:
        data = {"sources": [asdict(fact) for fact in facts], "stages": [asdict(share) for share in shares(run)]}
        sys.stdout.write(json.dumps(data, indent=2) + "\n")
    else:
        tokenizer = load_tokenizer(run.data.tokenizer) if run.data.tokenizer else None
        _show(Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH), run, facts, corpora, tokenizer)
    path = run.run_dir / "document_lengths.png"
    try:
        draw_lengths(path, {name: corpus.lengths for name, corpus in corpora.items()})
    except OSError as error:
        raise UserError(f"{path} cannot be written", why=error.strerror or str(error)) from error
    sys.stderr.write(f"document lengths: {path}\n")
    check_amounts(run, blends_of(run), {name: corpus.num_tokens for name, corpus in corpora.items()})
    return 0


def used(run: Run) -> list[str]:
    """Sources that some stage reads, in the recipe's order."""
    names = {source for blend in blends_of(run).values() for source in blend.shares}
    return [name for name in run.data.sources if name in names]


def source_facts(run: Run, corpora: dict[str, IndexedTokens]) -> Iterator[SourceFacts]:
    """What the run reads of each source, and how often."""
    tokens: dict[str, int] = dict.fromkeys(corpora, 0)
    for share in shares(run):
        tokens[share.source] += share.tokens
    for name, corpus in corpora.items():
        yield SourceFacts(
            source=name,
            tag=run.data.sources[name].tag,
            documents=len(corpus.lengths),
            tokens=corpus.num_tokens,
            median_length=int(np.median(corpus.lengths)),
            longest=int(corpus.lengths.max()),
            read_tokens=tokens[name],
            epochs=tokens[name] / corpus.num_tokens,
            share=tokens[name] / max(sum(tokens.values()), 1),
        )


def shares(run: Run) -> Iterator[Share]:
    """Every source of every stage and length, in the order of training."""
    blends = blends_of(run)
    sums: dict[tuple[str, int, str | None, str], float] = {}
    for reading in planned(run, blends):
        key = (reading.stage, reading.shape.seq_length, reading.shape.blend, reading.source)
        sums[key] = sums.get(key, 0) + float(reading.tokens)
    for (stage, length, blend, source), tokens in sums.items():
        yield Share(stage, length, source, float(blends[blend].shares[source]), round(tokens))


def _show(
    console: Console, run: Run, facts: list[SourceFacts], corpora: dict[str, IndexedTokens], tokenizer: Tokenizer | None
) -> None:
    table = Table(title=f"Sources of {run.name}: {sum(f.read_tokens for f in facts):,} tokens", title_justify="left")
    for name in ("source", "tag", "documents", "tokens", "median", "longest", "read", "epochs", "share"):
        table.add_column(name, justify="left" if name in ("source", "tag") else "right")
    for fact in facts:
        numbers = (fact.documents, fact.tokens, fact.median_length, fact.longest, fact.read_tokens)
        table.add_row(fact.source, fact.tag, *(f"{n:,}" for n in numbers), f"{fact.epochs:.3g}", f"{fact.share:.2%}")
    console.print(table)
    tags = {fact.tag: sum(other.share for other in facts if other.tag == fact.tag) for fact in facts}
    if len(tags) > 1:
        console.print("by tag: " + ", ".join(f"{tag or 'none'} {share:.2%}" for tag, share in tags.items()))
    stages = Table(title="Blends by stage", title_justify="left")
    for name in ("stage", "length", "source", "share", "tokens"):
        stages.add_column(name, justify="left" if name in ("stage", "source") else "right")
    for each in shares(run):
        stages.add_row(each.stage, f"{each.seq_length:,}", each.source, f"{each.share:.2%}", f"{each.tokens:,}")
    console.print(stages)
    for name, corpus in corpora.items() if tokenizer is not None else ():
        assert tokenizer is not None
        for number, text in text_samples(corpus, tokenizer):
            console.print(f"[bold]{name}[/], document {number:,} begins: {escape(repr(text))}", highlight=False)


def text_samples(corpus: IndexedTokens, tokenizer: Tokenizer) -> Iterator[tuple[int, str]]:
    """Numbers and beginnings of documents evenly spread over a source, the same ones every time."""
    documents = len(corpus.lengths)
    for number in sorted({(2 * part + 1) * documents // (2 * _SHOWN_DOCUMENTS) for part in range(_SHOWN_DOCUMENTS)}):
        start = corpus.read(number, 0, min(_SHOWN_TOKENS, int(corpus.lengths[number])))
        yield number, tokenizer.decode(start.tolist())


def draw_lengths(path: Path, lengths: dict[str, NDArray[np.int64]]) -> None:
    """Write a PNG: for each source, the tokens that lie in documents of each length (logarithmic)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.2 + 1.3 * len(lengths)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    longest = max(int(each.max()) for each in lengths.values())
    edges = np.logspace(0, np.log10(longest + 1), 48)
    for row, (name, each) in enumerate(lengths.items(), start=1):
        axes = figure.add_subplot(len(lengths), 1, row)
        axes.hist(each, bins=edges.tolist(), weights=each, color="#1f6fb2")
        axes.set_xscale("log")
        axes.set_xlim(1, longest + 1)
        axes.set_ylabel("tokens", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_title(f"{name}: {len(each):,} documents", loc="left", fontsize=9)
    axes.set_xlabel("document length (tokens)", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
