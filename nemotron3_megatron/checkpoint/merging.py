"""The weighted mean of a window of checkpoints: what decaying the learning rate over the window would have given.

docs/merging.md derives the weights. Memory holds the tensors of one output file and one stored shard, however many
checkpoints are merged.
"""

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nemotron3_megatron.checkpoint import compare, manifest
from nemotron3_megatron.checkpoint.directory import CheckpointDirectory
from nemotron3_megatron.checkpoint.huggingface.load import FILE_BYTES
from nemotron3_megatron.checkpoint.huggingface.mapping import Box, Entry
from nemotron3_megatron.checkpoint.huggingface.publish import published
from nemotron3_megatron.checkpoint.huggingface.reading import CheckpointReader
from nemotron3_megatron.checkpoint.huggingface.writing import Chunk, write_checkpoint
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.telemetry import run_record

Decay = Literal["minus_sqrt", "linear", "mean"]
Order = Literal["sequential", "reversed", "random"]

BOX_ELEMENTS = 2**26
"""Elements that are averaged at a time: 512 MiB in FP64."""


@dataclass(frozen=True, slots=True)
class Merge:
    """What was merged."""

    path: Path
    sources: tuple[str, ...]
    weights: tuple[float, ...]


def weights_of(tokens: Sequence[int], decay: Decay) -> list[float]:
    """Weight of each checkpoint; they add up to 1.

    Args:
        tokens: seen at each checkpoint, increasing; the emulated decay begins at the first and ends at the last.
        decay: of the learning rate; ``mean`` weighs all alike.
    """
    if decay == "mean" or len(tokens) == 1:
        return [1 / len(tokens)] * len(tokens)
    shares = [(seen - tokens[0]) / (tokens[-1] - tokens[0]) for seen in tokens]
    rates = [1.0, *(_mean_rate(a, b, decay) for a, b in pairwise(shares)), 0.0]
    return [before - after for before, after in pairwise(rates)]


def arranged(weights: Sequence[float], order: Order, seed: int) -> list[float]:
    """The same weights, given to the checkpoints in another order (Ultra report, checkpoint merging)."""
    found = list(weights)
    if order == "reversed":
        found.reverse()
    if order == "random":
        random.Random(seed).shuffle(found)
    return found


def merge(
    run_dir: Path,
    out: Path,
    *,
    window_tokens: int | None = None,
    decay: Decay = "minus_sqrt",
    order: Order = "sequential",
    seed: int = 0,
    file_bytes: int = FILE_BYTES,
) -> Merge:
    """Merge a run's newest checkpoints into weights that training, generation and export can start from.

    Args:
        run_dir: with the checkpoints.
        out: new or empty; it appears when everything is written.
        window_tokens: back from the newest; None: all there are.
        decay: see :func:`weights_of`.
        order: see :func:`arranged`.
        seed: of the order ``random``.
        file_bytes: size at which a file of the output is ended.

    Raises:
        UserError: there are fewer than two checkpoints in the window, one is damaged, or they differ in shape.
    """
    paths, tokens = _window(run_dir, window_tokens)
    weights = arranged(weights_of(tokens, decay), order, seed)
    readers = [CheckpointReader(path) for path in paths]
    for reader in readers[:-1]:
        rows = compare.differences(reader.shapes, readers[-1].shapes)
        if rows:
            raise UserError(
                f"checkpoint {reader.path}", why=f"is of another model than {paths[-1].name}\n{compare.table(rows)}"
            )
    sources = tuple(path.name for path in paths)
    with published(out) as directory:
        write_checkpoint(_chunks(readers, weights), directory, file_bytes)
        shutil.copy(run_dir / run_record.FILE_NAME, directory)
        files = {path.name: manifest.record(path) for path in sorted(directory.iterdir())}
        described = {"sources": list(sources), "weights": weights, "decay": decay, "order": order}
        state = {"step": 0, "merged": described}
        manifest.write(Manifest(step=0, optimizer_step=None, layout={}, files=files, state=state), directory)
    return Merge(out, sources, tuple(weights))


def _mean_rate(begin: float, end: float, decay: Decay) -> float:
    """Mean of the decayed learning rate, as a share of the undecayed one, between two shares of the window."""
    if decay == "linear":
        return 1 - (begin + end) / 2
    a, b = math.sqrt(begin), math.sqrt(end)
    return 1 - 2 / 3 * (a * a + a * b + b * b) / (a + b)  # (b**3 - a**3) / (b**2 - a**2) without cancellation


def _window(run_dir: Path, window_tokens: int | None) -> tuple[list[Path], list[int]]:
    """Checkpoints in the window and the tokens they have seen, oldest first."""
    seen = {path: _verified(path).state.get("tokens") for path in CheckpointDirectory(run_dir).present()}
    counted = sorted((tokens, path) for path, tokens in seen.items() if tokens is not None)
    newest = counted[-1][0] if counted else 0
    inside = [(t, path) for t, path in counted if window_tokens is None or t >= newest - window_tokens]
    if len(inside) < 2:
        raise UserError(
            f"run_dir={run_dir}",
            why=f"{len(inside)} of its {len(counted)} checkpoints are in the window, and a merge needs two",
            nearest="a longer window=, or a run with checkpoint.keep_every='25B tokens'",
        )
    return [path for _, path in inside], [tokens for tokens, _ in inside]


def _verified(path: Path) -> Manifest:
    """A merge without a checkpoint that is damaged would be another one than was asked for."""
    try:
        return manifest.verify(path)
    except ValueError as damage:
        nearest = f"nemotron3 checkpoint rm {path.parents[1]}, which removes what is damaged"
        raise UserError(f"checkpoint {path}", why=f"is damaged: {damage}", nearest=nearest) from None


def _chunks(readers: Sequence[CheckpointReader], weights: Sequence[float]) -> Iterator[Chunk]:
    for key, shape in sorted(readers[-1].shapes.items()):
        dtype = readers[-1].dtype(Entry(key, shape, (Box(key, (0,) * len(shape), shape),)))
        for box in _boxes(key, shape):
            yield Chunk(box, shape, dtype, partial(_mean, readers, weights, box, dtype))


def _boxes(key: str, shape: tuple[int, ...]) -> Iterator[Box]:
    """A tensor in slices along its first axis, so that even experts stacked in one tensor stay small."""
    if not shape:
        yield Box(key, (), ())
        return
    rows = max(1, BOX_ELEMENTS // max(1, prod(shape[1:])))
    for start in range(0, shape[0], rows):
        size = (min(rows, shape[0] - start), *shape[1:])
        yield Box(key, (start, *[0] * (len(shape) - 1)), size)


def _mean(readers: Sequence[CheckpointReader], weights: Sequence[float], box: Box, dtype: torch.dtype) -> Tensor:
    """In FP64, rounded once; what is not a real number (a counter) is the newest's."""
    if not dtype.is_floating_point:
        return readers[-1].box(box)
    total = torch.zeros(box.size, dtype=torch.float64)
    for reader, weight in zip(readers, weights, strict=True):
        total.add_(reader.box(box), alpha=weight)
    return total.to(dtype)
