"""A whole preparation, from a recipe to a manifest; run again, it does only what is not done yet."""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep.bpe import train_bpe, training_fingerprint
from data_prep.executors import run_stages
from data_prep.inputs import InputFile, discover
from data_prep.manifest import MANIFEST, Manifest
from data_prep.pipeline import DEDUP, SHARDS, fingerprint, shard_tasks, stages
from data_prep.progress import done, followed
from data_prep.recipe import PreparationRecipe
from data_prep.shard import ShardTask, finished
from data_prep.stage import Stage, progress_directory
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer

logger = logging.getLogger(__name__)

_LINE_SECONDS = 30.0
"""Between two lines about progress in a log file."""


def prepare(recipe: PreparationRecipe, console: Console) -> Manifest | None:
    """Make ``recipe.output``: ``train``, ``validation``, the tokenizer and ``manifest.json``.

    Returns:
        The manifest; None when the work was only submitted.

    Raises:
        UserError: the input, the tokenizer or the output directory is unusable. What is finished stays.
    """
    directory = Path(recipe.output)
    files = discover(recipe.input)
    (directory / SHARDS).mkdir(parents=True, exist_ok=True)
    with _alone_in(directory):
        return _prepare(recipe, directory, files, console)


def _prepare(
    recipe: PreparationRecipe, directory: Path, files: Sequence[InputFile], console: Console
) -> Manifest | None:
    manifest = _up_to_date(recipe, directory, files)
    if manifest is not None:
        console.print(f"{directory} is up to date.", soft_wrap=True)
        return manifest
    before = _tokenizer_file(directory)
    (directory / MANIFEST).unlink(missing_ok=True)
    with _progress(console) as progress, followed(_log_lines(progress, console)):
        tokenizer, tokenizer_file = _tokenizer(recipe, directory, files, progress)
        if before not in (None, tokenizer_file):  # of another kind: the directory would have two
            before.unlink(missing_ok=True)
        tasks = shard_tasks(recipe, directory, files, tokenizer)
        plan = stages(recipe, tasks, tokenizer_file)
        _mark(plan, tasks)
        with followed(_follower(progress, plan, tasks)):
            run_stages(recipe, plan)
    if not (directory / MANIFEST).is_file():
        return None
    _tidy(recipe, directory, plan, tasks)
    return Manifest.load(directory)


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Keep other preparations out of a directory; they would write to the same files.

    Raises:
        UserError: there is one.
    """
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        why = "another preparation is writing there"
        raise UserError(f"output={directory}", why=why, nearest="another output, or wait for its end") from error
    except OSError:
        logger.info("%s is on a file system without locks", directory)
    try:
        yield
    finally:
        os.close(descriptor)


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
    return manifest if same and manifest.holds(directory, fingerprint(recipe, tokenizer), files) else None


def _tokenizer_file(directory: Path) -> Path | None:
    """The tokenizer that an earlier preparation left in a directory."""
    try:
        return directory / Manifest.load(directory).tokenizer.file
    except UserError:
        return None


def _tokenizer(
    recipe: PreparationRecipe, directory: Path, files: Sequence[InputFile], progress: Progress
) -> tuple[Tokenizer, Path]:
    """The tokenizer, saved in the output directory; a trained one is kept while what it was trained on holds."""
    if recipe.tokenizer.path is not None:
        tokenizer = load_tokenizer(recipe.tokenizer.path, recipe.tokenizer.eod)
        return tokenizer, tokenizer.save(directory)
    mark, saved = directory / SHARDS / "bpe.fingerprint", directory / "tokenizer.json"
    trained_on = training_fingerprint(recipe, files)
    if saved.is_file() and mark.is_file() and mark.read_text() == trained_on:
        return load_tokenizer(saved), saved
    total = min(recipe.tokenizer.train_bytes, sum(file.size for file in files))
    bar = progress.add_task("training the tokenizer", total=total, amount=_megabytes(total))
    tokenizer = train_bpe(recipe, files, lambda count: progress.advance(bar, count))
    progress.update(bar, completed=total)
    saved = tokenizer.save(directory)
    mark.write_text(trained_on)
    return tokenizer, saved


def _mark(plan: Sequence[Stage], tasks: Sequence[ShardTask]) -> None:
    """Tell the executors which shards are complete: what counts is whether they still hold for their input."""
    for stage in plan:
        shutil.rmtree(progress_directory(stage.logs), ignore_errors=True)
    *_, tokens, manifest = plan
    for stage in (tokens, manifest):
        shutil.rmtree(stage.logs / "completions", ignore_errors=True)
    (tokens.logs / "completions").mkdir(parents=True)
    for rank, task in enumerate(tasks):
        if finished(task) is not None:
            (tokens.logs / "completions" / f"{rank:05d}").touch()


def _follower(progress: Progress, plan: Sequence[Stage], tasks: Sequence[ShardTask]) -> Callable[[], None]:
    """What keeps the bars of all stages up to date; a stage that has nothing to do has none."""
    bars: list[tuple[Stage, TaskID, int]] = []
    for stage in plan:
        left = sorted(set(range(stage.num_tasks)) - stage.completed)
        total = sum(tasks[rank].size for rank in left) if stage.reads else len(left)
        if total:
            bars.append((stage, progress.add_task(stage.name, total=total, amount="", start=False), total))

    def look() -> None:
        for stage, bar, total in bars:
            count = done(progress_directory(stage.logs)) if stage.reads else len(stage.completed)
            if not count:
                continue
            progress.start_task(bar)
            amount = _megabytes(total) if stage.reads else f"{count}/{total} tasks"
            progress.update(bar, completed=min(count, total), amount=amount)

    return look


def _log_lines(progress: Progress, console: Console) -> Callable[[], None]:
    """What writes a line now and then about the work at hand where bars are not shown, as in a log file."""
    written = time.monotonic()

    def look() -> None:
        nonlocal written
        if console.is_terminal or time.monotonic() - written < _LINE_SECONDS:
            return
        written = time.monotonic()
        for task in progress.tasks:
            if task.started and not task.finished:
                left = "?" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
                elapsed = timedelta(seconds=round(task.elapsed or 0))
                amount = f"{task.percentage:.0f}% of {task.fields['amount']}"
                console.print(f"{task.description}: {amount}, {elapsed}, ETA {left}", highlight=False)

    return look


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _tidy(recipe: PreparationRecipe, directory: Path, plan: Sequence[Stage], tasks: Sequence[ShardTask]) -> None:
    """Remove shards and results of dedup of earlier inputs, or everything when shards are not to be kept."""
    if not recipe.keep_shards:
        shutil.rmtree(directory / SHARDS)
        return
    current = {task.prefix.name for task in tasks}
    in_use = {part for stage in plan for part in stage.logs.parts}
    for path in (directory / SHARDS).iterdir():
        number = path.name.split(".")[0]
        if number.isdigit() and number not in current:
            path.unlink()
        elif path.name.startswith(DEDUP) and path.name not in in_use:
            shutil.rmtree(path)


def _progress(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% of {task.fields[amount]}"),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
    )
