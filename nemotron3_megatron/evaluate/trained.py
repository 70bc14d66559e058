"""A trained model in one process, whatever layout it was trained under."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron3_megatron.checkpoint.huggingface import import_model
from nemotron3_megatron.checkpoint.huggingface.source import run_of
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.pipeline import hybrid_layer_pattern
from nemotron3_megatron.config.recipe import ParallelConfig, Recipe
from nemotron3_megatron.config.run import Layout, Run
from nemotron3_megatron.data.tokenizer import Tokenizer, load_tokenizer
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.model.hybrid import Nemotron3Model
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.platform.base import Spec


@dataclass(frozen=True, slots=True)
class Trained:
    """A model with its weights, in evaluation mode, and the tokenizer of its data."""

    run: Run
    step: int
    """Optimizer steps of its training."""
    model: Nemotron3Model
    tokenizer: Tokenizer
    device: torch.device


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model with its weights, in evaluation mode, and what its training was at."""

    run: Run
    state: dict[str, Any]
    """As it was given to ``CheckpointStore.save``."""
    model: Nemotron3Model
    groups: ProcessGroupCollection
    device: torch.device


@contextmanager
def trained(
    checkpoint: Path, tokenizer: str | None = None, *, recipe: str | Recipe | None = None, spec: Spec | None = None
) -> Iterator[Trained]:
    """Load a model into one process; its process group lives as long as the context.

    Args:
        checkpoint: ``<run_dir>/checkpoints/step_XXXXXXXX``, whose model is described by ``<run_dir>/run.json``; or the
            directory of a Hugging Face model, which is imported into the system's temporary directory first.
        tokenizer: None: the one named in the run, or the one of the Hugging Face model.
        recipe: the recipe that describes a Hugging Face model, or its name; for no other checkpoint.
        spec: implementation of the modules; None: as the run or the recipe says. Checkpoints are the same in both.

    Raises:
        UserError: the checkpoint, its run or the tokenizer is missing or does not fit.
    """
    if not (checkpoint / "config.json").is_file():
        if recipe is not None:
            raise UserError("recipe", why="is given, but the checkpoint's run.json describes its model")
        with _loaded(checkpoint, tokenizer, spec) as model:
            yield model
        return
    if recipe is None:
        why = "is a Hugging Face model, which a recipe must describe"
        raise UserError(f"checkpoint={checkpoint}", why=why, nearest="recipe=NAME, as for nemotron3 import")
    with TemporaryDirectory(prefix="nemotron3-") as directory:
        imported = import_model(checkpoint, recipe, Path(directory) / "checkpoint")
        with _loaded(imported, tokenizer or str(checkpoint), spec) as model:
            yield model


@contextmanager
def _loaded(checkpoint: Path, tokenizer: str | None, spec: Spec | None) -> Iterator[Trained]:
    _require_directory(checkpoint)
    tokens = _tokenizer(run_of(checkpoint), tokenizer)
    with loaded(checkpoint, spec) as found:
        yield Trained(found.run, int(found.state["step"]), found.model, tokens, found.device)


@contextmanager
def loaded(checkpoint: Path, spec: Spec | None = None) -> Iterator[Loaded]:
    """A distributed checkpoint's model in one process, whose process group lives as long as the context.

    Raises:
        UserError: the checkpoint or its run is missing or does not fit.
    """
    _require_directory(checkpoint)
    run = on_one_rank(run_of(checkpoint))
    run = replace(run, model=replace(run.model, spec=spec or run.model.spec))
    platform = select("auto")
    platform.start(local_rank=0)
    # A store inside the process: nothing listens on a port, and torchrun's environment is not needed.
    store = torch.distributed.HashStore()  # type: ignore[attr-defined]
    torch.distributed.init_process_group(platform.collective_backend, store=store, rank=0, world_size=1)
    try:
        groups = start_groups(run, platform)
        chunks = build_model(run, platform, groups)
        state = CheckpointStore(run.run_dir).load(checkpoint, chunks, None)
        (model,) = chunks
        model.eval()
        yield Loaded(run, state, model, groups, platform.device)
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
        hybrid_layer_pattern=hybrid_layer_pattern(run.model, 1, run.longest),
    )
    return replace(run, parallel=parallel, layout=layout)


def _require_directory(checkpoint: Path) -> None:
    """Refuse what is not there, naming the newest checkpoint beside it."""
    if checkpoint.is_dir():
        return
    others = sorted(checkpoint.parent.glob("step_*"))
    nearest = f"checkpoint={others[-1]}" if others else "checkpoint=RUN_DIR/checkpoints/step_XXXXXXXX"
    raise UserError(f"checkpoint={checkpoint}", why="there is no such directory", nearest=nearest)


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
