"""A whole preparation, from a recipe to a manifest; run again, it does only what is not done yet."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.bpe import train_bpe, training_fingerprint
from data_prep.inputs import InputFile, discover, group
from data_prep.manifest import MANIFEST, Manifest, finish
from data_prep.pool import make_shards
from data_prep.recipe import PreparationRecipe
from data_prep.shard import ShardTask, finished
from data_prep.splits import SPLITS
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_SHARDS = "shards"


def prepare(recipe: PreparationRecipe, console: Console) -> Manifest:
    """Make ``recipe.output``: ``train``, ``validation``, the tokenizer and ``manifest.json``.

    Raises:
        UserError: the input, the tokenizer or the output directory is unusable. What is finished stays.
    """
    directory = Path(recipe.output)
    files = discover(recipe.input)
    (directory / _SHARDS).mkdir(parents=True, exist_ok=True)
    manifest = _up_to_date(recipe, directory, files)
    if manifest is not None:
        console.print(f"{directory} is up to date.", soft_wrap=True)
        return manifest
    with _progress(console) as progress:
        tokenizer, tokenizer_file = _tokenizer(recipe, directory, files, progress)
        tasks = _tasks(recipe, directory, files, tokenizer, tokenizer_file)
        _tokenise(recipe, tasks, progress)
    records = [record for task in tasks if (record := finished(task)) is not None]
    if len(records) < len(tasks):
        raise UserError("the input changed while it was read", nearest="run again; unchanged shards are kept")
    _check_splits(recipe, *(sum(record.splits[split].documents for record in records) for split in SPLITS))
    manifest = finish(
        directory,
        recipe=recipe.name,
        fingerprint=_fingerprint(recipe, tokenizer),
        tokenizer=tokenizer,
        tokenizer_file=tokenizer_file,
        tasks=tasks,
        records=records,
    )
    _tidy(recipe, directory, tasks)
    return manifest


def _up_to_date(recipe: PreparationRecipe, directory: Path, files: Sequence[InputFile]) -> Manifest | None:
    if not (directory / MANIFEST).is_file():
        return None
    try:
        manifest = Manifest.load(directory)
        tokenizer = load_tokenizer(directory / manifest.tokenizer.file)
    except UserError as error:
        logger.warning("preparing again: %s", error)
        return None
    same = tokenizer.fingerprint == manifest.tokenizer.fingerprint
    return manifest if same and manifest.holds(directory, _fingerprint(recipe, tokenizer), files) else None


def _fingerprint(recipe: PreparationRecipe, tokenizer: Tokenizer) -> str:
    """Of every setting that decides the tokens."""
    settings = asdict(recipe)
    for key in ("name", "output", "num_workers", "keep_shards"):
        del settings[key]
    return hashlib.sha256(json.dumps([settings, tokenizer.fingerprint]).encode()).hexdigest()[:16]


def _tokenizer(
    recipe: PreparationRecipe, directory: Path, files: Sequence[InputFile], progress: Progress
) -> tuple[Tokenizer, Path]:
    """The tokenizer, saved in the output directory; a trained one is kept while what it was trained on holds."""
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.path, recipe.tokenizer.eod)
        return tokenizer, tokenizer.save(directory)
    mark, saved = directory / _SHARDS / "bpe.fingerprint", directory / "tokenizer.json"
    fingerprint = training_fingerprint(recipe, files)
    if saved.is_file() and mark.is_file() and mark.read_text() == fingerprint:
        return load_tokenizer(saved), saved
    total = min(recipe.tokenizer.train_bytes, sum(file.size for file in files))
    bar = progress.add_task("training the tokenizer", total=total)
    tokenizer = train_bpe(recipe, files, lambda count: progress.advance(bar, count))
    progress.update(bar, completed=total)
    saved = tokenizer.save(directory)
    mark.write_text(fingerprint)
    return tokenizer, saved


def _tasks(
    recipe: PreparationRecipe, directory: Path, files: Sequence[InputFile], tokenizer: Tokenizer, tokenizer_file: Path
) -> list[ShardTask]:
    return [
        ShardTask(
            prefix=directory / _SHARDS / f"{number:05d}",
            files=members,
            text_field=recipe.input.text_field,
            on_error=recipe.on_error,
            validation_fraction=recipe.validation_fraction,
            tokenizer=tokenizer_file,
            fingerprint=_fingerprint(recipe, tokenizer),
        )
        for number, members in enumerate(group(files, recipe.shard_bytes))
    ]


def _tokenise(recipe: PreparationRecipe, tasks: Sequence[ShardTask], progress: Progress) -> None:
    sizes = {task.prefix: sum(file.size for file in task.files) for task in tasks}
    open_tasks = [task for task in tasks if finished(task) is None]
    if done := len(tasks) - len(open_tasks):
        logger.info("%d of %d shards are finished already", done, len(tasks))
    bar = progress.add_task(f"tokenising {len(open_tasks)} shards", total=sum(sizes[t.prefix] for t in open_tasks))
    make_shards(open_tasks, recipe.num_workers, lambda count: progress.advance(bar, count))


def _check_splits(recipe: PreparationRecipe, train: int, validation: int) -> None:
    if not train:
        raise UserError("no document is left to train on", why="all input was empty, defective or held out")
    if recipe.validation_fraction and not validation:
        raise UserError(
            f"validation_fraction={recipe.validation_fraction} holds out none of {train} documents",
            nearest="a larger share, more documents, or validation_fraction=0",
        )


def _tidy(recipe: PreparationRecipe, directory: Path, tasks: Sequence[ShardTask]) -> None:
    """Remove shards of earlier inputs, or all of them when they are not to be kept."""
    if not recipe.keep_shards:
        shutil.rmtree(directory / _SHARDS)
        return
    current = {task.prefix.name for task in tasks}
    for path in (directory / _SHARDS).iterdir():
        number = path.name.split(".")[0]
        if number.isdigit() and number not in current:
            path.unlink()


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
