"""A distributed checkpoint as a published Hugging Face model."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from nemotron3_megatron.checkpoint import compare
from nemotron3_megatron.checkpoint.huggingface import tokenizer as tokenizers
from nemotron3_megatron.checkpoint.huggingface.config import generation_config, model_config
from nemotron3_megatron.checkpoint.huggingface.mapping import FLOAT32_KEYS, Entry, checkpoint_shapes, entries
from nemotron3_megatron.checkpoint.huggingface.publish import published
from nemotron3_megatron.checkpoint.huggingface.reading import CheckpointReader
from nemotron3_megatron.checkpoint.huggingface.shards import Item, Spec, write_shards
from nemotron3_megatron.checkpoint.huggingface.source import run_of
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run

_log = logging.getLogger(__name__)

ExportFormat = Literal["trained", "quantised"]
"""trained: the weights as training holds them; quantised: as its forward pass reads them (``checkpoint/quantised``)."""

SHARD_BYTES = 4 * 10**9
"""Default size of a file, which is also what an export needs in memory."""

Contents = Callable[[Path], tuple[Iterator[Item], dict[str, Any]]]
"""Takes the directory that is being written, for further files; gives the tensors, and what ``config.json`` says about
them in addition."""


def export_model(
    checkpoint_dir: str | Path,
    out_dir: str | Path,
    *,
    tokenizer: str | None = None,
    number_format: ExportFormat = "trained",
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write a checkpoint in the published layout: configuration, safetensors with index, tokenizer.

    Weights keep the type that training gave them. No process group, GPU or model is made.

    Args:
        checkpoint_dir: ``RUN_DIR/checkpoints/step_XXXXXXXX``, or an imported checkpoint.
        out_dir: new or empty; it appears when everything is written.
        tokenizer: None: the one named in the run; "none": leave it out.
        number_format: see :data:`ExportFormat`.
        shard_bytes: see :data:`SHARD_BYTES`.

    Returns:
        ``out_dir``.

    Raises:
        UserError: the checkpoint is incomplete, damaged or of another model than its run's, ``nemotron_h`` cannot
            express it, the tokenizer is not there, or ``out_dir`` cannot be written.
    """
    run = run_of(Path(checkpoint_dir))

    def contents(directory: Path) -> tuple[Iterator[Item], dict[str, Any]]:
        reader = CheckpointReader(Path(checkpoint_dir))
        require_match(reader, run)
        every = entries(run.model)
        # The run's own type may be another since it was continued, or the model's where it was imported.
        found = {"torch_dtype": str(reader.dtype(every[0])).removeprefix("torch.")}
        if number_format == "trained":
            return (trained_item(reader, entry) for entry in every), found
        from nemotron3_megatron.checkpoint.quantised.export import quantised_items, write_description

        items = quantised_items(reader, run)
        return items, found | write_description(reader, run, directory)

    return write_model(out_dir, run, contents, tokenizer=tokenizer, shard_bytes=shard_bytes)


def write_model(
    out_dir: str | Path, run: Run, contents: Contents, *, tokenizer: str | None = None, shard_bytes: int = SHARD_BYTES
) -> Path:
    """Write a model in the published layout: what does not depend on its numbers is checked before they are made.

    Args:
        out_dir: new or empty; it appears when everything is written.
        run: whose model it is.
        contents: see :data:`Contents`.
        tokenizer: as for :func:`export_model`.
        shard_bytes: likewise.

    Returns:
        ``out_dir``.

    Raises:
        UserError: as for :func:`export_model`.
    """
    named = tokenizer or run.data.tokenizer
    found = tokenizers.load(named, run.model.vocab_size)
    tokens = tokenizers.special_tokens(found, named)
    config = model_config(run.model, torch_dtype(run), tokens)
    with published(Path(out_dir)) as directory:
        items, more = contents(directory)
        write_shards(items, directory, shard_bytes)
        _write_json(directory / "config.json", config | more)
        _write_json(directory / "generation_config.json", generation_config(tokens))
        if found is None:
            _log.warning("exported without a tokenizer, with the published ids of special tokens")
        else:
            tokenizers.save(found, str(named), directory)
    return Path(out_dir)


def published_specs(run: Run) -> Iterator[Spec]:
    """Name, shape and type of every tensor that an export of this run's checkpoints has, from the recipe alone."""
    for entry in entries(run.model):
        keeps = entry.boxes[0].key.endswith(FLOAT32_KEYS)
        yield Spec(entry.name, entry.shape, torch.float32 if keeps else getattr(torch, torch_dtype(run)))


def torch_dtype(run: Run) -> str:
    """torch's name of the type of a run's parameters."""
    return {"bf16": "bfloat16", "fp32": "float32"}[run.precision.dtype]


def trained_item(reader: CheckpointReader, entry: Entry) -> Item:
    """A tensor with the numbers that the checkpoint has."""
    spec = Spec(entry.name, entry.shape, reader.dtype(entry))
    return Item((spec,), partial(_only, reader, entry))


def require_match(reader: CheckpointReader, run: Run) -> None:
    """Refuse a checkpoint of another model.

    Raises:
        UserError: with a table of the tensors that differ.
    """
    rows = compare.differences(reader.shapes, checkpoint_shapes(run.model))
    if rows:
        raise UserError(
            f"checkpoint {reader.path}",
            why=f"it is not of the model in its run.json; {len(rows)} tensors differ\n{compare.table(rows)}",
        )


def _only(reader: CheckpointReader, entry: Entry) -> tuple[torch.Tensor]:
    return (reader.tensor(entry),)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
