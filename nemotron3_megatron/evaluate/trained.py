"""A trained model in one process, whatever layout it was trained under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.pipeline import hybrid_layer_pattern
from nemotron3_megatron.config.recipe import ParallelConfig
from nemotron3_megatron.config.run import Layout, Run
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.telemetry.run_record import read_run_record


@dataclass(frozen=True, slots=True)
class Trained:
    """A model with its weights, in evaluation mode, and the tokenizer of its data."""

    run: Run
    step: int
    """Optimizer steps of its training."""
    model: Nemotron3Model
    tokenizer: Tokenizer
    device: torch.device


@contextmanager
def trained(checkpoint: Path, tokenizer: str | None = None) -> Iterator[Trained]:
    """Load a checkpoint into one process; its process group lives as long as the context.

    Args:
        checkpoint: ``<run_dir>/checkpoints/step_XXXXXXXX``; the model is described by ``<run_dir>/run.json``.
        tokenizer: None: the one named in the run.

    Raises:
        UserError: the checkpoint, its run or the tokenizer is missing or does not fit.
    """
    run = on_one_rank(read_run_record(_run_dir(checkpoint)).run)
    tokens = _tokenizer(run, tokenizer)
    platform = select("auto")
    platform.start(local_rank=0)
    # A store inside the process: nothing listens on a port, and torchrun's environment is not needed.
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(platform.collective_backend, store=store, rank=0, world_size=1)
    try:
        chunks = build_model(run, platform, start_groups(run, platform))
        state = CheckpointStore(run.run_dir).load(checkpoint, chunks, None)
        (model,) = chunks
        model.eval()
        yield Trained(run, int(state["step"]), model, tokens, platform.device)
    finally:
        stop_groups()


def on_one_rank(run: Run) -> Run:
    """The same model in a world of one: every parallel size is 1."""
    parallel = ParallelConfig(sequence_parallel=False, distributed_optimizer=False)
    layout = Layout(
        world_size=1,
        tp=1,
        pp=1,
        vpp=1,
        cp=1,
        ep=1,
        etp=1,
        dp=1,
        sequence_parallel=False,
        hybrid_layer_pattern=hybrid_layer_pattern(run.model, 1, max(stage.seq_length for stage in run.stages)),
    )
    return replace(run, parallel=parallel, layout=layout)


def _run_dir(checkpoint: Path) -> Path:
    """The run directory a checkpoint lies in.

    Raises:
        UserError: ``checkpoint`` is no checkpoint directory; a run directory's newest one is named.
    """
    inside = sorted((checkpoint / "checkpoints").glob("step_*"))
    if inside:
        raise UserError(f"checkpoint={checkpoint}", why="is a run directory", nearest=f"checkpoint={inside[-1]}")
    if not checkpoint.is_dir():
        where = checkpoint.parent
        others = sorted(where.glob("step_*"))
        nearest = f"checkpoint={others[-1]}" if others else "checkpoint=RUN_DIR/checkpoints/step_XXXXXXXX"
        raise UserError(f"checkpoint={checkpoint}", why="there is no such directory", nearest=nearest)
    return checkpoint.resolve().parent.parent


def _tokenizer(run: Run, path: str | None) -> Tokenizer:
    named = path or run.data.tokenizer
    if named is None:
        raise UserError("the run names no tokenizer", where="run.json: data.tokenizer", nearest="tokenizer=PATH")
    found = load_tokenizer(named)
    if found.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer {named}",
            why=f"has {found.vocab_size:,} entries, the model {run.model.vocab_size:,}",
            nearest="tokenizer=PATH of the one that made the training data",
        )
    return found
