"""A recipe as stages: dedup if asked for, then the shards, then the manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from data_prep.dedup import dedup
from data_prep.filters import filter_state, filters
from data_prep.inputs import InputFile, group
from data_prep.loaded import loaded
from data_prep.long.step import LongDocuments
from data_prep.manifest import finish
from data_prep.readers import Keys
from data_prep.recipe import PreparationRecipe
from data_prep.shard import ShardTask
from data_prep.splits import repository_of_file
from data_prep.stage import Stage, progress_directory
from data_prep.steps import ReadShard, WriteShard
from nemotron3_megatron.data.tokenizer import Tokenizer

SHARDS = "shards"
DEDUP = "dedup-"
"""Results of dedup lie in a directory whose name changes with all they depend on."""


def fingerprint(recipe: PreparationRecipe, tokenizer: Tokenizer) -> str:
    """Of every setting that decides the tokens."""
    settings = asdict(recipe)
    for key in ("name", "output", "num_workers", "keep_shards", "executor"):
        del settings[key]
    settings["filters"] = filter_state(recipe.filters)
    return _digest(settings, tokenizer.fingerprint)


def keys(recipe: PreparationRecipe) -> Keys:
    """What is read of each record."""
    others: tuple[str, ...] = ()
    long = recipe.long
    if long is not None and long.kind == "repositories" and long.repository_field is not None:
        others = (long.repository_field, long.path_field)
    elif long is not None and long.kind == "document_qa":
        others = (long.questions_field,)
    return Keys(recipe.input.text_field, others)


def shard_tasks(
    recipe: PreparationRecipe, directory: Path, files: Sequence[InputFile], tokenizer: Tokenizer
) -> list[ShardTask]:
    """The shards of a recipe. With dedup each depends on all input: a copy may be anywhere."""
    mark = fingerprint(recipe, tokenizer)
    if recipe.dedup.exact or recipe.dedup.minhash:
        mark = _digest(mark, _dedup_state(recipe, files))
    if recipe.long is not None and recipe.long.kind == "repositories" and recipe.long.repository_field is None:
        groups = group(files, recipe.shard_bytes, lambda file: repository_of_file(file.name))
    else:
        groups = group(files, recipe.shard_bytes)
    return [ShardTask(directory / SHARDS / f"{number:05d}", members, mark) for number, members in enumerate(groups)]


def stages(recipe: PreparationRecipe, tasks: Sequence[ShardTask], tokenizer_file: Path) -> list[Stage]:
    """Everything that must run, in order.

    Raises:
        UserError: a filter's hook does not exist.
    """
    shards = Path(recipe.output) / SHARDS

    def reading(logs: Path) -> list[PipelineStep]:
        return [
            ReadShard(tasks, keys(recipe), recipe.on_error, progress_directory(logs)),
            *filters(recipe.filters),
        ]

    files = [file for task in tasks for file in task.files]
    results = shards / f"{DEDUP}{_dedup_state(recipe, files)}"
    copies = dedup(recipe.dedup, results, len(tasks), reading)
    logs = shards / "logs"
    steps = [*reading(logs / "tokens"), *copies.steps]
    if recipe.long is not None:
        steps.append(LongDocuments(recipe.long, tokenizer_file, recipe.validation_fraction, recipe.on_error))
    write = WriteShard(tasks, steps[0], steps[1:], tokenizer_file, recipe)
    return [
        *copies.stages,
        Stage("tokens", (*steps, write), len(tasks), logs / "tokens", reads=True),
        Stage("manifest", (WriteManifest(recipe, tasks, tokenizer_file),), 1, logs / "manifest"),
    ]


class WriteManifest(PipelineStep):  # type: ignore[misc]  # datatrove is not typed
    """Merges finished shards and writes the manifest."""

    type = "WRITER"
    name = "manifest"

    def __init__(self, recipe: PreparationRecipe, tasks: Sequence[ShardTask], tokenizer_file: Path) -> None:
        super().__init__()
        self.recipe = recipe
        self.tasks = tuple(tasks)
        self.tokenizer_file = tokenizer_file

    def run(self, data: Iterable[Document] | None = None, rank: int = 0, world_size: int = 1) -> None:
        """The only task."""
        tokenizer = loaded(self.tokenizer_file)
        finish(self.recipe, fingerprint(self.recipe, tokenizer), tokenizer, self.tokenizer_file, self.tasks)


def _dedup_state(recipe: PreparationRecipe, files: Sequence[InputFile]) -> str:
    """Changes with everything that decides which documents are copies, and with their numbering."""
    settings = [asdict(recipe.dedup), filter_state(recipe.filters), asdict(recipe.input)]
    seen = [[file.name, file.size, file.path.stat().st_mtime_ns] for file in files]
    return _digest(settings, recipe.shard_bytes, recipe.on_error, seen)


def _digest(*content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
