"""A Hugging Face model as a distributed checkpoint that training can start from."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from nemotron3_megatron.checkpoint import compare, manifest
from nemotron3_megatron.checkpoint.huggingface.config import differences
from nemotron3_megatron.checkpoint.huggingface.mapping import checkpoint_shapes, entries
from nemotron3_megatron.checkpoint.huggingface.publish import published
from nemotron3_megatron.checkpoint.huggingface.shards import ShardReader
from nemotron3_megatron.checkpoint.huggingface.writing import Chunk, write_checkpoint
from nemotron3_megatron.checkpoint.manifest import Manifest
from nemotron3_megatron.config import compose, resolve
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import ModelConfig, Recipe
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.config.serialize import plain
from nemotron3_megatron.telemetry import run_record

FILE_BYTES = 2 * 10**9
"""Size at which a file of the checkpoint is ended, which is also what an import needs in memory."""


def import_model(
    hf_dir: str | Path,
    recipe: str | Recipe,
    checkpoint_dir: str | Path,
    *,
    overrides: Sequence[str] = (),
    file_bytes: int = FILE_BYTES,
) -> Path:
    """Write a published model's weights as a distributed checkpoint, for ``checkpoint.load`` under any layout.

    Numbers keep their type; training takes each into its parameter's. The checkpoint has no optimizer state: step 0
    of a new run. Its ``run.json`` describes the recipe, so that it can be exported and generated from.

    Args:
        hf_dir: with ``config.json`` and safetensors, of ``nemotron_h``.
        recipe: name of the recipe whose model it is, or the recipe.
        checkpoint_dir: new or empty; it appears when everything is written.
        overrides: further ``key=value`` of the recipe, where it is named.
        file_bytes: see :data:`FILE_BYTES`.

    Returns:
        ``checkpoint_dir``.

    Raises:
        UserError: the files are not there or damaged, are of another model than the recipe's (with a table), or
            ``checkpoint_dir`` cannot be written.
    """
    source = Path(hf_dir)
    composed = compose([f"recipe={recipe}", *overrides])[0] if isinstance(recipe, str) else recipe
    model = composed.model
    _require_same_function(_config(source), model, source)
    run = _described(composed, source)
    reader = ShardReader(source)
    _require_same_tensors(reader, model, source)
    with published(Path(checkpoint_dir)) as directory:
        write_checkpoint(_chunks(reader, model), directory, file_bytes)
        _write_run(run, directory)
        files = {path.name: manifest.record(path) for path in sorted(directory.iterdir())}
        manifest.write(Manifest(step=0, optimizer_step=None, layout={}, files=files, state={"step": 0}), directory)
    return Path(checkpoint_dir)


def _chunks(reader: ShardReader, model: ModelConfig) -> Iterator[Chunk]:
    shapes = checkpoint_shapes(model)
    for entry in entries(model):
        dtype = reader.specs[entry.name].dtype
        for box, rows in zip(entry.boxes, entry.rows, strict=True):
            yield Chunk(box, shapes[box.key], dtype, partial(reader.tensor, entry.name, rows))


def _config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    try:
        config = dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"hf={directory}", why="holds no config.json") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(str(path), why=f"cannot be read: {error}") from None
    if config.get("model_type") != "nemotron_h":
        raise UserError(f"hf={directory}", why=f"is a {config.get('model_type')}, not a nemotron_h")
    if "quantization_config" in config:
        raise UserError(f"hf={directory}", why="its weights are quantised", nearest="the BF16 model it was made from")
    return config


def _require_same_function(config: dict[str, Any], model: ModelConfig, directory: Path) -> None:
    rows = differences(config, model)
    if rows:
        table = "\n".join(f"  {key}: {theirs} in config.json, {ours} in the recipe" for key, theirs, ours in rows)
        raise UserError(f"hf={directory}", why=f"is not the recipe's model\n{table}", nearest="recipe=NAME of its own")


def _require_same_tensors(reader: ShardReader, model: ModelConfig, directory: Path) -> None:
    found = {name: spec.shape for name, spec in reader.specs.items()}
    rows = compare.differences(found, {entry.name: entry.shape for entry in entries(model)})
    if not rows:
        return
    only_mtp = all(name.startswith("mtp.") and shape == "absent" for name, shape, _ in rows)
    nearest = "model.mtp_depths=0 model.mtp_pattern=''" if only_mtp else None
    why = f"is not the recipe's model; {len(rows)} tensors differ\n{compare.table(rows)}"
    raise UserError(f"hf={directory}", why=why, nearest=nearest)


def _described(recipe: Recipe, source: Path) -> Run:
    """The run that the checkpoint will name: the recipe's, with the model's own tokenizer where it has one."""
    if (source / "tokenizer.json").is_file():
        recipe = replace(recipe, data=replace(recipe.data, tokenizer=str(source.resolve())))
    return resolve(recipe, recipe.world_size or 1)


def _write_run(run: Run, directory: Path) -> None:
    try:
        ours = version("nemotron3-megatron")
    except PackageNotFoundError:
        ours = None
    record = {"run": plain(run), "versions": {"nemotron3-megatron": ours}, "git_commit": None, "platform": "imported"}
    (directory / run_record.FILE_NAME).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
