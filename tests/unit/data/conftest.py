"""Small corpora on disk, written with Megatron-Core's own builder, and runs that read them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

import nemotron3_megatron  # noqa: F401  adapts Megatron-Core to this machine before it is imported
from nemotron3_megatron.config.recipe import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    PrecisionConfig,
    SourceConfig,
    TelemetryConfig,
)
from nemotron3_megatron.config.run import Layout, Run, Schedule, Stage

WriteCorpus = Callable[..., Path]
MakeRun = Callable[..., Run]
MakeStage = Callable[..., Stage]


@pytest.fixture
def write_corpus(tmp_path: Path) -> WriteCorpus:
    """write_corpus(name, documents, dtype=int32) -> prefix of a .bin/.idx pair with these documents."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    def write(name: str, documents: Sequence[Sequence[int]], dtype: type = np.int32) -> Path:
        prefix = tmp_path / name
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
        for document in documents:
            builder.add_document(np.array(document, dtype=np.int64), [len(document)])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return write


@pytest.fixture
def make_stage() -> MakeStage:
    """make_stage(seq_length, global_batch_size, micro_batch_size, dp) -> a stage."""

    def make(seq_length: int = 8, global_batch_size: int = 8, micro_batch_size: int = 2, dp: int = 1) -> Stage:
        return Stage(
            name="only",
            first_step=0,
            steps=100,
            first_token=0,
            tokens_per_step=seq_length * global_batch_size,
            seq_length=seq_length,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            num_microbatches=global_batch_size // (micro_batch_size * dp),
        )

    return make


@pytest.fixture
def make_run(tmp_path: Path, make_stage: MakeStage) -> MakeRun:
    """make_run(sources={name: (prefix, weight)}, ...) -> a run that reads them; all else is of no interest here."""

    def make(
        sources: dict[str, tuple[Path, float]],
        *,
        validation: dict[str, tuple[Path, float]] | None = None,
        seed: int = 7,
        num_prefetch: int = 2,
        vocab_size: int = 10_000,
        mtp_depths: int = 1,
        isolate_documents: bool = True,
        eval_batches: int = 2,
    ) -> Run:
        def configs(pairs: dict[str, tuple[Path, float]]) -> dict[str, SourceConfig]:
            return {name: SourceConfig(path=str(prefix), weight=weight) for name, (prefix, weight) in pairs.items()}

        return Run(
            name="test",
            run_dir=tmp_path,
            seed=seed,
            device="cpu",
            total_steps=100,
            model=ModelConfig(pattern="M*", hidden_size=8, vocab_size=vocab_size, mtp_depths=mtp_depths),
            precision=PrecisionConfig(name="bf16"),
            parallel=ParallelConfig(),
            layout=Layout(
                world_size=1,
                tp=1,
                pp=1,
                vpp=1,
                cp=1,
                ep=1,
                etp=1,
                dp=1,
                sequence_parallel=False,
                hybrid_layer_pattern="M*",
            ),
            optimizer=OptimizerConfig(lr=1e-3, min_lr=1e-5),
            schedule=Schedule(
                max_lr=1e-3,
                min_lr=1e-5,
                warmup_tokens=0,
                decay_end_tokens=1,
                wsd_decay_tokens=0,
                decay_style="constant",
                wsd_decay_style="linear",
            ),
            stages=(make_stage(),),
            data=DataConfig(
                sources=configs(sources),
                validation=configs(validation or {}),
                isolate_documents=isolate_documents,
                num_prefetch=num_prefetch,
            ),
            checkpoint=CheckpointConfig(),
            telemetry=TelemetryConfig(eval_batches=eval_batches, precision_every=None),
            origins=(),
        )

    return make


@pytest.fixture
def numbered() -> Callable[..., list[list[int]]]:
    """numbered(lengths, first=1) -> documents whose tokens all differ, counting from first, each ending with EOD 0."""

    def make(lengths: Sequence[int], first: int = 1) -> list[list[int]]:
        documents, token = [], first
        for length in lengths:
            documents.append([*range(token, token + length - 1), 0])
            token += length - 1
        return documents

    return make
