"""Dedup over all shards, with datatrove's steps: each shard writes signatures, copies are found, then left out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    ExactDedupConfig,
    ExactDedupFilter,
    ExactDedupSignature,
    ExactFindDedups,
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.utils.hashing import HashConfig

from data_prep.filters import Words
from data_prep.recipe import DedupConfig
from data_prep.stage import Stage

_SHA1 = HashConfig(precision=64, hash_fc="sha1")
"""Not datatrove's default, xxhash: with its version 4 datatrove 0.10 fails."""
_READ_LINES = 1024
"""Signatures that are read at a time from each shard's file."""

Reading = Callable[[Path], list[PipelineStep]]
"""The steps that read the documents to compare, given the logging directory of their stage."""


@dataclass(frozen=True, slots=True)
class Dedup:
    """What must run before the tokens are made, and the steps that then leave copies out."""

    stages: tuple[Stage, ...]
    steps: tuple[PipelineStep, ...]


def dedup(config: DedupConfig, directory: Path, num_shards: int, reading: Reading) -> Dedup:
    """The stages and steps of a recipe; none when it asks for no dedup.

    Args:
        directory: for signatures and results; a restart keeps what is complete in it.
    """
    stages: list[Stage] = []
    steps: list[PipelineStep] = []
    logs = directory / "logs"

    def folder(name: str) -> str:
        return str(directory / name)

    if config.exact:
        exact = ExactDedupConfig(content_getter=_text, hash_config=_SHA1)
        sign = ExactDedupSignature(folder("exact"), exact)
        find = ExactFindDedups(folder("exact"), folder("exact_copies"), exact, lines_to_buffer=_READ_LINES)
        signing = (*reading(logs / "exact"), sign)
        stages += [
            Stage("hashes of texts", signing, num_shards, logs / "exact", reads=True),
            Stage("exact copies", (find,), 1, logs / "exact_copies"),
        ]
        steps.append(_named(ExactDedupFilter(folder("exact_copies"), exact), "exact copy"))
    if config.minhash:
        near = MinhashConfig(config.ngram, config.buckets, config.hashes_per_bucket, hash_config=_SHA1)
        signing = (*reading(logs / "minhash"), *steps, MinhashDedupSignature(folder("minhash"), near, language=Words()))
        pair = MinhashDedupBuckets(folder("minhash"), folder("pairs"), config=near, lines_to_buffer=_READ_LINES)
        cluster = MinhashDedupCluster(folder("pairs"), folder("near_copies"), near)
        stages += [
            Stage("MinHash signatures", signing, num_shards, logs / "minhash", reads=True),
            Stage("MinHash buckets", (pair,), config.buckets, logs / "pairs"),
            Stage("MinHash clusters", (cluster,), 1, logs / "near_copies"),
        ]
        steps.append(_named(MinhashDedupFilter(folder("near_copies")), "near copy"))
    return Dedup(tuple(stages), tuple(steps))


def _text(document: Document) -> str:
    return str(document.text)


def _named(step: PipelineStep, name: str) -> PipelineStep:
    """The manifest counts what a step drops under its name."""
    step.name = name
    return step
