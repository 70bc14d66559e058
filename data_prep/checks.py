"""What a preparation recipe must fulfil before anything is read."""

from __future__ import annotations

from data_prep.recipe import PreparationRecipe
from nemotron3_megatron.config.errors import UserError

_SYNTHETIC = ("retrieval", "multi_hop", "aggregation")
_MIN_LONG_TOKENS = 1024
"""The statements and questions of a long document need room beside its text."""


def check(recipe: PreparationRecipe) -> None:
    """Refuse what cannot be done.

    Raises:
        UserError: with the key, the reason and what to write instead.
    """
    _check_numbers(recipe)
    _check_tokenizer(recipe)
    if not recipe.input.paths:
        raise UserError("input.paths=[]", why="there is nothing to read", nearest="input.paths=[FILE_OR_DIRECTORY]")
    if not 0 <= recipe.validation_fraction < 1:
        raise UserError(
            f"validation_fraction={recipe.validation_fraction}", why="it is a share of the documents, from 0 to below 1"
        )
    if recipe.executor.kind == "slurm" and recipe.executor.partition is None:
        raise UserError("executor.kind=slurm", why="it needs a partition", nearest="executor.partition=NAME")
    _check_long(recipe)


def _check_numbers(recipe: PreparationRecipe) -> None:
    for key, value, least in (
        ("num_workers", recipe.num_workers, 1),
        ("shard_bytes", recipe.shard_bytes, 1),
        ("tokenizer.train_bytes", recipe.tokenizer.train_bytes, 1),
        ("tokenizer.vocab_size", recipe.tokenizer.vocab_size, 257),
        ("filters.min_characters", recipe.filters.min_characters, 0),
        ("filters.max_characters", recipe.filters.max_characters, max(1, recipe.filters.min_characters)),
        ("dedup.ngram", recipe.dedup.ngram, 1),
        ("dedup.buckets", recipe.dedup.buckets, 1),
        ("dedup.hashes_per_bucket", recipe.dedup.hashes_per_bucket, 1),
        ("executor.cpus_per_task", recipe.executor.cpus_per_task, 1),
        ("executor.mem_per_cpu_gb", recipe.executor.mem_per_cpu_gb, 1),
    ):
        if value is not None and value < least:
            raise UserError(f"{key}={value}", why=f"it must be at least {least}", nearest=f"{key}={least}")


def _check_tokenizer(recipe: PreparationRecipe) -> None:
    tokenizer = recipe.tokenizer
    if tokenizer.kind == "bpe" and tokenizer.path is not None:
        raise UserError(
            f"tokenizer.path={tokenizer.path}",
            why="a BPE is trained, not loaded",
            nearest=f"tokenizer.kind=pretrained tokenizer.path={tokenizer.path}",
        )
    if tokenizer.kind == "pretrained" and tokenizer.path is None:
        raise UserError("tokenizer.path", why="a pretrained tokenizer needs one", nearest="tokenizer.path=tekken")


def _check_long(recipe: PreparationRecipe) -> None:
    long = recipe.long
    if long is None:
        return
    if recipe.validation_by == "repository" and long.kind != "repositories":
        raise UserError(
            "validation_by=repository",
            why=f"long.kind={long.kind} puts documents of any repository together",
            nearest="validation_by=document, or long.kind=repositories",
        )
    if not long.lengths:
        raise UserError("long.lengths=[]", nearest="long.lengths=[131072]")
    synthetic = long.kind in _SYNTHETIC
    for key, value, least in (
        ("long.lengths", min(long.lengths), _MIN_LONG_TOKENS if synthetic else 2),
        ("long.items", long.items, 1),
        ("long.hops", long.hops, 1),
    ):
        if value < least:
            raise UserError(f"{key}: {value}", why=f"it must be at least {least}", nearest=f"{key} {least}")
