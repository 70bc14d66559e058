"""A preparation recipe: which text becomes which tokens, as frozen dataclasses with units in their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from nemotron3_megatron.config.provenance import check_single_writers
from nemotron3_megatron.config.typed import typed

RECIPES = Path(__file__).resolve().parent / "recipes"

Format = Literal["auto", "text", "jsonl", "parquet", "arrow", "warc"]
Policy = Literal["stop", "skip"]
LongKind = Literal["pack", "repositories", "retrieval", "multi_hop", "aggregation", "document_qa"]


@dataclass(frozen=True, slots=True, kw_only=True)
class InputConfig:
    """Where text comes from."""

    paths: tuple[str, ...]
    """Files, directories (read recursively, hidden files left out), glob patterns, hf://datasets/OWNER/NAME[@REVISION]
    [/PATTERN] (downloaded first), or python-stdlib."""
    format: Format = "auto"
    """text: a file is a document. jsonl: a line is. parquet, arrow (datasets' save_to_disk): a row is. warc: a record
    is; HTML becomes text through trafilatura. auto: by suffix. .gz and .zst are unpacked."""
    text_field: str = "text"
    """Key or column that holds the text in jsonl, parquet and arrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FilterConfig:
    """Which documents are kept. All of them unless something is set."""

    min_characters: int = 0
    max_characters: int | None = None
    quality: Literal["none", "english", "any"] = "none"
    """Gopher's quality and repetition rules (arXiv:2112.11446, table A1) on words split at non-word characters; any:
    without its rule on English stop words. For prose, not for code."""
    hooks: tuple[str, ...] = ()
    """Own filters, MODULE:FUNCTION, such as a language or quality classifier. The function takes a datatrove Document
    (text, id, metadata) and returns True to keep it, False, or (False, reason)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DedupConfig:
    """Which copies are left out. One of each set is kept; two more passes over the input are needed."""

    exact: bool = False
    """Documents with the same 64-bit hash of their text: about n²/2^65 of n documents are wrongly taken for copies."""
    minhash: bool = False
    """Near copies: MinHash with banding over word n-grams, clustered."""
    ngram: int = 5
    buckets: int = 14
    hashes_per_bucket: int = 8
    """Documents of similarity s are found with probability 1 - (1 - s^hashes_per_bucket)^buckets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LongConfig:
    """Long documents made of the short ones that are left after filters and dedup."""

    kind: LongKind
    """pack: documents end to end. repositories: the files of a repository, what is imported before what imports it.
    retrieval, multi_hop, aggregation: packed documents with statements scattered among them, and questions about these
    at the end. document_qa: packed documents, then the questions that came with them."""
    lengths: tuple[int, ...] = (131_072,)
    """Tokens of the long documents, end of document included; taken in turn. A repository is cut at the last one."""
    items: int = 4
    """Questions at the end of each document, for the synthetic kinds."""
    hops: int = 4
    """Statements to follow for one answer, for multi_hop; parts of one sum, for aggregation."""
    repository_field: str | None = None
    """Key or column that names the repository; null: the first directory below input.paths."""
    path_field: str = "path"
    """Key or column that names the file in its repository, when repository_field is set."""
    questions_field: str = "questions"
    """Key or column of document_qa: a list of {question, answer}."""
    seed: int = 1


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
    """Text a BPE is trained on at most, taken from files in random order, filtered, copies included."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """Where the shards are made: datatrove's executors, and a local one."""

    kind: Literal["local", "slurm", "ray"] = "local"
    """local: processes of this machine. slurm: array jobs; output must lie on a shared filesystem. ray: the cluster
    that RAY_ADDRESS names, or one of this machine."""
    partition: str | None = None
    """SLURM partition; required for slurm."""
    time: str = "24:00:00"
    """SLURM time limit of a shard."""
    qos: str | None = None
    cpus_per_task: int = 1
    mem_per_cpu_gb: int = 4
    wait: bool = True
    """slurm: follow the jobs to the end. false: submit and return; the last job writes the manifest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparationRecipe:
    """A whole preparation."""

    name: str
    input: InputConfig
    output: str
    """Directory of train.{bin,idx}, validation.{bin,idx}, the tokenizer and manifest.json."""
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    filters: FilterConfig = field(default_factory=FilterConfig)
    dedup: DedupConfig = field(default_factory=DedupConfig)
    long: LongConfig | None = None
    """null: documents stay as they are."""
    executor: ExecutorConfig = field(default_factory=ExecutorConfig)
    validation_fraction: float = 0.0
    """Share of the documents (of repositories: whole ones) held out, chosen by a hash of their text (or name), so
    copies fall on the same side. Long documents are made of documents of one side."""
    validation_by: Literal["document", "repository"] = "document"
    """repository: hold out all files of a repository (the first directory below input.paths) or none, as
    long.kind=repositories always does, by the same hash: what one of two such preparations holds out, both do."""
    on_error: Policy = "stop"
    """What to do with input that cannot be read: stop, or leave it out and report it."""
    shard_bytes: int = 64_000_000
    """Input files are grouped into shards of about this size; a shard is the unit of work and of restart."""
    keep_shards: bool = True
    """Keep finished shards after merging, so that a change of some inputs redoes only their shards."""
    num_workers: int | None = None
    """Shards at a time; null: one a core, on a cluster all of them."""


def compose(overrides: Sequence[str], recipes: Path = RECIPES) -> PreparationRecipe:
    """The recipe that ``recipe=NAME key=value ...`` describes.

    Raises:
        UserError: anything wrong with what was written, with its place.
    """
    from data_prep.checks import check
    from nemotron3_megatron.config.tree import load  # Hydra: only where recipes are composed

    composed = load(overrides, recipes)
    writers = check_single_writers(composed.writes)

    def place(key: str) -> str | None:
        return writers[key].place if key in writers else None

    recipe = typed(PreparationRecipe, {"name": composed.recipe_name, **composed.data}, "", place)
    assert isinstance(recipe, PreparationRecipe)
    check(recipe)
    return recipe
