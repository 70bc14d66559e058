"""A preparation recipe: which text becomes which tokens, as frozen dataclasses with units in their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.provenance import check_single_writers
from nemotron3_megatron.config.typed import typed

RECIPES = Path(__file__).resolve().parent / "recipes"

Format = Literal["auto", "text", "jsonl", "parquet"]
Policy = Literal["error", "skip"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """Where text comes from."""

    paths: tuple[str, ...]
    """Files, directories (read recursively, hidden files left out), glob patterns, or python-stdlib."""
    format: Format = "auto"
    """text: a file is a document. jsonl: a line is. parquet: a row is. auto: by suffix; .gz and .zst are unpacked."""
    text_field: str = "text"
    """Key or column that holds the text in jsonl and parquet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerConfig:
    """What turns text into token ids."""

    kind: Literal["bpe", "pretrained"] = "pretrained"
    """bpe: byte-level BPE trained on the training split. pretrained: path."""
    path: str | None = None
    """Whatever load_tokenizer takes: tokenizer.json, directory, Hugging Face id, tekken.json, or tekken."""
    vocab_size: int = 4096
    """Entries of a trained BPE; at least 257 (256 bytes and the end of document)."""
    eod: str | None = None
    """End-of-document token; null: <|endoftext|> for bpe, else what the tokenizer's files say."""
    train_bytes: int = 256_000_000
    """Text a BPE is trained on at most, taken from files in random order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationRecipe:
    """A whole preparation."""

    name: str
    input: InputConfig
    output: str
    """Directory of train.{bin,idx}, validation.{bin,idx}, the tokenizer and manifest.json."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    validation_fraction: float = 0.0
    """Share of the documents held out, chosen by a hash of their text, so copies fall on the same side."""
    on_error: Policy = "error"
    """What to do with input that cannot be read: stop, or leave it out and report it."""
    shard_bytes: int = 64_000_000
    """Input files are grouped into shards of about this size; a shard is the unit of work and of restart."""
    keep_shards: bool = True
    """Keep finished shards after merging, so that a change of some inputs redoes only their shards."""
    num_workers: int = 2


def compose(overrides: Sequence[str], recipes: Path = RECIPES) -> PreparationRecipe:
    """The recipe that ``recipe=NAME key=value ...`` describes.

    Raises:
        UserError: anything wrong with what was written, with its place.
    """
    from nemotron3_megatron.config.tree import load  # Hydra: only where recipes are composed

    composed = load(overrides, recipes)
    writers = check_single_writers(composed.writes)

    def place(key: str) -> str | None:
        return writers[key].place if key in writers else None

    recipe = typed(PreparationRecipe, {"name": composed.recipe_name, **composed.data}, "", place)
    assert isinstance(recipe, PreparationRecipe)
    _check(recipe)
    return recipe


def _check(recipe: PreparationRecipe) -> None:
    tokenizer = recipe.tokenizer
    if not recipe.input.paths:
        raise UserError("input.paths=[]", why="there is nothing to read", nearest="input.paths=[FILE_OR_DIRECTORY]")
    if not 0 <= recipe.validation_fraction < 1:
        raise UserError(
            f"validation_fraction={recipe.validation_fraction}", why="it is a share of the documents, from 0 to below 1"
        )
    for key, value, least in (
        ("num_workers", recipe.num_workers, 1),
        ("shard_bytes", recipe.shard_bytes, 1),
        ("tokenizer.train_bytes", tokenizer.train_bytes, 1),
        ("tokenizer.vocab_size", tokenizer.vocab_size, 257),
    ):
        if value < least:
            raise UserError(f"{key}={value}", why=f"it must be at least {least}", nearest=f"{key}={least}")
    if tokenizer.kind == "bpe" and tokenizer.path is not None:
        raise UserError(
            f"tokenizer.path={tokenizer.path}",
            why="a BPE is trained, not loaded",
            nearest=f"tokenizer.kind=pretrained tokenizer.path={tokenizer.path}",
        )
    if tokenizer.kind == "pretrained" and tokenizer.path is None:
        raise UserError("tokenizer.path", why="a pretrained tokenizer needs one", nearest="tokenizer.path=tekken")
