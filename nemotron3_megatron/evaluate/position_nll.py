"""How well a model predicts a token by how much it has seen before: mean negative log-likelihood by position.

A model that uses its context predicts later tokens of a long document better (white paper section 2.5: held-out
repository-level code). Every document is cut into windows of one length from its beginning, so a position in the
window says nothing about the place in the document but for the first window; what changes along it is the context.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
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


def position_nll(model: Trained, windows: Iterator[NDArray[np.int64]]) -> NDArray[np.float64]:
    """(windows, seq_length) nats: the loss of each token, given the ones before it in its window.

    Args:
        model: in evaluation mode.
        windows: (seq_length + 1,) int64 token ids each; document ends inside isolate nothing.
    """
    rows = []
    for window in windows:
        batch = build_micro_batch(
            torch.from_numpy(window)[None],
            mtp_depths=model.run.model.mtp_depths,
            eod_token=model.run.data.eod_token,
            isolate_documents=False,
        ).to(model.device)
        with torch.no_grad():
            losses = model.model(batch.tokens, batch.position_ids, labels=batch.labels)
        rows.append(losses[0, 0].double().cpu().numpy())
    return np.stack(rows)


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
    with trained(options.checkpoint) as model:
        corpus = IndexedTokens(options.data, vocab_size=model.run.model.vocab_size)
        losses = position_nll(model, islice(long_windows(corpus, options.seq_length), options.windows))
        out = options.out or options.checkpoint.resolve().parent.parent
    found = buckets(losses)
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
    out.mkdir(parents=True, exist_ok=True)
    record = {"checkpoint": str(options.checkpoint), "data": options.data, "windows": losses.shape[0]}
    text = json.dumps({**record, "buckets": [asdict(each) for each in found]}, indent=2)
    (out / "position_nll.json").write_text(text + "\n", encoding="utf-8")
    draw_position_nll(out / "position_nll.png", losses, found)
    sys.stderr.write(f"{out}/position_nll.json, {out}/position_nll.png\n")
    return 0


def draw_position_nll(path: Path, losses: NDArray[np.float64], found: Sequence[Bucket]) -> None:
    """The cumulative mean at every position, and the means of the buckets with twice their standard errors."""
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
    axes.set_xscale("log", base=2)
    axes.set_xlim(_FIRST_BUCKET // 4, losses.shape[1])
    axes.set_xlabel("position in the window (tokens)")
    axes.set_ylabel("nats per token")
    axes.grid(color="#e4e8ec", linewidth=0.8)
    axes.legend(frameon=False)
    figure.savefig(path)
