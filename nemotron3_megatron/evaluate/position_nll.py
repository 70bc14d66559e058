"""How well a model predicts a token by how much it has seen before: mean negative log-likelihood by position.

A model that uses its context predicts later tokens of a long document better (white paper section 2.5: held-out
repository-level code). Every document is cut into windows of one length from its beginning, so a position in the
window says nothing about the place in the document but for the first window; what changes along it is the context.
Still, positions are different text. ``contexts`` reads the same tokens again in shorter pieces, so that only the
context differs.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.words import options_of
from nemotron3_megatron.data.batch import build_micro_batch
from nemotron3_megatron.data.indexed import IndexedTokens
from nemotron3_megatron.evaluate.trained import Trained, trained

_FIRST_BUCKET = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of ``nemotron3 nll``."""

    checkpoint: Path
    data: str
    """Prefix of a ``.bin``/``.idx`` pair of long documents."""
    seq_length: int
    windows: int = 64
    """At most so many, of the first documents."""
    contexts: tuple[int, ...] = ()
    """Also the mean over the same windows cut into pieces of so many tokens; each divides seq_length."""
    out: Path | None = None
    """Directory of position_nll.json and position_nll.png; null: the run's."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Positions [first, end) of all windows."""

    first: int
    end: int
    nll: float
    """Mean in nats per token."""
    error: float
    """Standard error of the mean over windows; not a number for one window."""
    cumulative: float
    """Mean over all positions before ``end``."""


@dataclass(frozen=True, slots=True)
class Context:
    """The same tokens, none of which sees more than ``tokens`` before it."""

    tokens: int
    nll: float
    """Mean in nats per token."""
    above: float
    """What that is above the mean in whole windows."""
    error: float
    """Standard error of ``above`` over windows; not a number for one window."""


def position_nll(
    model: Trained, windows: Iterable[NDArray[np.int64]], context: int | None = None
) -> NDArray[np.float64]:
    """(windows, seq_length) nats: the loss of each token, given the ones before it in its window.

    Args:
        model: in evaluation mode.
        windows: (seq_length + 1,) int64 token ids each; document ends inside isolate nothing.
        context: given those in its piece of so many tokens of the window; None: the whole window.
    """
    rows = []
    for window in windows:
        batch = build_micro_batch(
            torch.from_numpy(pieces(window, context or len(window) - 1)),
            mtp_depths=model.run.model.mtp_depths,
            eod_token=model.run.data.eod_token,
            isolate_documents=False,
        ).to(model.device)
        with torch.no_grad():
            losses = model.model(batch.tokens, batch.position_ids, labels=batch.labels)
        rows.append(losses[0].flatten().double().cpu().numpy())
    return np.stack(rows)


def pieces(window: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """(n * length + 1,) tokens -> (n, length + 1): each piece ends with the token that the next one begins with."""
    return sliding_window_view(window, length + 1)[::length].copy()


def context_of(tokens: int, limited: NDArray[np.float64], whole: NDArray[np.float64]) -> Context:
    """Compare losses (windows, seq_length) under a limited context with those in whole windows."""
    differences = (limited - whole).mean(axis=1)
    error = differences.std(ddof=1) / np.sqrt(len(differences)) if len(differences) > 1 else np.nan
    return Context(tokens, float(limited.mean()), float(differences.mean()), float(error))


def long_windows(corpus: IndexedTokens, seq_length: int) -> Iterator[NDArray[np.int64]]:
    """Windows of ``seq_length + 1`` tokens, ``seq_length`` apart, from the beginning of each document.

    Raises:
        UserError: no document is long enough.
    """
    if corpus.lengths.max() <= seq_length:
        raise UserError(
            f"seq_length={seq_length}",
            why=f"the longest document of {corpus.prefix} has {corpus.lengths.max():,} tokens",
            nearest=f"seq_length={corpus.lengths.max() - 1}, or documents put together (data_prep, long=)",
        )
    for document, length in enumerate(corpus.lengths):
        for start in range(0, int(length) - seq_length, seq_length):
            yield corpus.read(document, start, seq_length + 1)


def buckets(losses: NDArray[np.float64]) -> tuple[Bucket, ...]:
    """Means over ranges of positions that double in length: [0, 64), [64, 128), [128, 256), ..."""
    count, length = losses.shape
    found, first = [], 0
    while first < length:
        end = min(max(2 * first, _FIRST_BUCKET), length)
        means = losses[:, first:end].mean(axis=1)
        error = float(means.std(ddof=1) / np.sqrt(count)) if count > 1 else float("nan")
        found.append(Bucket(first, end, float(means.mean()), error, float(losses[:, :end].mean())))
        first = end
    return tuple(found)


def nll_main(overrides: Sequence[str]) -> int:
    """Print the table; write it as JSON and as a picture.

    Raises:
        UserError: an option, the checkpoint or the data cannot be used.
    """
    options: Options = options_of(Options, overrides)
    for name in ("seq_length", "windows"):
        if getattr(options, name) < 1:
            raise UserError(f"{name}={getattr(options, name)}", why="must be at least 1")
    for tokens in options.contexts:
        if tokens < 1 or options.seq_length % tokens:
            raise UserError(f"contexts: {tokens}", why=f"does not divide seq_length={options.seq_length}")
    with trained(options.checkpoint) as model:
        corpus = IndexedTokens(options.data, vocab_size=model.run.model.vocab_size)
        windows = list(islice(long_windows(corpus, options.seq_length), options.windows))
        losses = position_nll(model, windows)
        contexts = [context_of(each, position_nll(model, windows, each), losses) for each in options.contexts]
        out = options.out or options.checkpoint.resolve().parent.parent
    found = buckets(losses)
    _show(options, losses, found, contexts)
    out.mkdir(parents=True, exist_ok=True)
    record = {"checkpoint": str(options.checkpoint), "data": options.data, "windows": losses.shape[0]}
    tables = {"buckets": [asdict(each) for each in found], "contexts": [asdict(each) for each in contexts]}
    (out / "position_nll.json").write_text(json.dumps(record | tables, indent=2) + "\n", encoding="utf-8")
    draw_position_nll(out / "position_nll.png", losses, found, contexts)
    sys.stderr.write(f"{out}/position_nll.json, {out}/position_nll.png\n")
    return 0


def _show(options: Options, losses: NDArray[np.float64], found: Sequence[Bucket], contexts: Sequence[Context]) -> None:
    table = Table(
        title=f"NLL by position: {losses.shape[0]} windows of {options.seq_length:,} tokens of {options.data}"
    )
    for name in ("positions", "nats per token", "standard error", "all until here"):
        table.add_column(name, justify="right")
    for each in found:
        table.add_row(
            f"{each.first:,} to {each.end - 1:,}", f"{each.nll:.4f}", f"{each.error:.4f}", f"{each.cumulative:.4f}"
        )
    Console().print(table)
    if contexts:
        limited = Table(title="The same tokens with less context")
        for name in ("at most so many tokens", "nats per token", "above whole windows", "standard error"):
            limited.add_column(name, justify="right")
        for one in contexts:
            limited.add_row(f"{one.tokens:,}", f"{one.nll:.4f}", f"{one.above:+.4f}", f"{one.error:.4f}")
        Console().print(limited)


def draw_position_nll(
    path: Path, losses: NDArray[np.float64], found: Sequence[Bucket], contexts: Sequence[Context] = ()
) -> None:
    """The cumulative mean at every position, and the means of the buckets with twice their standard errors.

    With ``contexts``, the mean over all tokens by the longest context that one of them sees.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = np.arange(1, losses.shape[1] + 1)
    means, shown = losses.mean(axis=0).cumsum() / positions, slice(_FIRST_BUCKET // 4, None)
    axes.plot(positions[shown], means[shown], color="#1f6fb2", label="mean up to a position")
    middles = [np.sqrt(max(each.first, 1) * each.end) for each in found]
    errors = [2 * each.error for each in found]
    axes.errorbar(middles, [each.nll for each in found], errors, fmt="o", color="#1f2933", label="mean of a range")
    if contexts:
        lengths = [*(each.tokens for each in contexts), losses.shape[1]]
        limited = [*(each.nll for each in contexts), float(losses.mean())]
        places = np.argsort(lengths)
        axes.plot(
            np.array(lengths)[places],
            np.array(limited)[places],
            "s-",
            color="#d9480f",
            label="all tokens, in pieces of a length",
            clip_on=False,
        )
    axes.set_xscale("log", base=2)
    axes.set_xlim(_FIRST_BUCKET // 4, losses.shape[1])
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("nats per token")
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(path)
