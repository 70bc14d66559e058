"""A run from start to exit code; read this first."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import torch

from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.training import TrainingData, ValidationData
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.observe import Observer
from nemotron3_megatron.telemetry.writers import Writer, build_writers
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.callbacks.checkpointing import Checkpointing
from nemotron3_megatron.train.callbacks.precision import PrecisionTelemetry
from nemotron3_megatron.train.callbacks.preemption import Preemption
from nemotron3_megatron.train.callbacks.recording import Recording, Validation
from nemotron3_megatron.train.loop import run_steps
from nemotron3_megatron.train.record import write_run_record
from nemotron3_megatron.train.step import Trainer, evaluate

_log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_START_AGAIN = 75
"""Saved, and wants to be started again (EX_TEMPFAIL of sysexits.h)."""


def train(run: Run) -> int:
    """Train under torchrun until the run's target, resuming from its newest checkpoint.

    Returns:
        The process exit code: EXIT_DONE, or EXIT_START_AGAIN after a preemption.

    Raises:
        UserError: something the user can mend (device, data, checkpoint) is wrong.
    """
    platform = select(run.device)
    platform.start(int(os.environ.get("LOCAL_RANK", "0")))
    preemption = Preemption(platform.device)
    groups = start_groups(run, platform)
    # Data first: damaged files are found before a model is built.
    data = TrainingData(run, groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())
    trainer = build_trainer(run, platform, groups)
    store = CheckpointStore(run.run_dir)
    progress = _restore(trainer, data, store)
    if torch.distributed.get_rank() == 0:
        write_run_record(run, platform, trainer.backend)
    stop = run_steps(trainer, data, progress, [preemption, *_callbacks(trainer, data, store, progress)])
    data.close()
    # Not after an error: other ranks may be waiting in a collective that will never come.
    stop_groups()
    return EXIT_START_AGAIN if stop is Stop.PREEMPTED else EXIT_DONE


def _restore(trainer: Trainer, data: TrainingData, store: CheckpointStore) -> Progress:
    """Continue from the run's newest complete checkpoint, else from ``checkpoint.load``, else start anew."""
    options = trainer.run.checkpoint
    newest = store.newest()
    if newest is not None and options.resume == "never":
        raise UserError(
            "checkpoint.resume=never",
            why=f"{trainer.run.run_dir} holds checkpoints, and a new run would mix with them",
            nearest="another run_dir, or checkpoint.resume=auto",
        )
    rank_zero = torch.distributed.get_rank() == 0
    if newest is not None and options.load is not None and rank_zero:
        _log.warning("checkpoint.load=%s is not used: the run continues from its own %s", options.load, newest)
    if newest is None and options.load is None:
        return Progress()
    source = newest or Path(str(options.load))
    state = store.load(source, trainer.chunks, trainer.optimizer)
    data.load_state_dict(state["data"], allow_data_change=options.allow_data_change)
    if rank_zero:
        before, plan = state.get("precision"), trainer.run.precision_plan
        if before is not None and before["fingerprint"] != plan.fingerprint:
            was, now = before["name"], trainer.run.precision.name
            _log.warning("the precision plan is not the checkpoint's: %s until here, %s from here on", was, now)
        _log.info("continuing from %s at step %d", source, state["step"])
    return Progress(step=state["step"])


def _callbacks(trainer: Trainer, data: TrainingData, store: CheckpointStore, progress: Progress) -> list[Callback]:
    """In the order in which they act after a step; they finish in reverse, so the last save finds writers open."""
    run, groups = trainer.run, trainer.groups
    rank_zero = torch.distributed.get_rank() == 0
    writers: list[Writer] = build_writers(run, progress.step or None) if rank_zero else []
    held_out = ValidationData(run, groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())

    def save(step: int) -> None:
        for writer in writers:
            writer.sync()
        state: dict[str, Any] = {
            "step": step,
            "tokens": run.tokens_at(step),
            "data": data.state_dict(),
            "precision": {"name": run.precision.name, "fingerprint": run.precision_plan.fingerprint},
        }
        store.save(step, trainer.chunks, trainer.optimizer, state, keep_last=run.checkpoint.keep_last)

    def held_out_loss(event: StepEvent) -> tuple[float, ...]:
        return evaluate(trainer, held_out.batches(event.stage), event.stage)

    observed = _precision_telemetry(trainer)
    return [
        *observed,
        Recording(
            run,
            trainer.platform,
            writers,
            backend=trainer.backend,
            operands=observed[0].records if observed else tuple,
        ),
        Validation(run, held_out_loss, writers),
        Checkpointing(run, save),
    ]


def _precision_telemetry(trainer: Trainer) -> list[PrecisionTelemetry]:
    """Empty where nothing is quantised or observed."""
    run = trainer.run
    if run.precision_every_steps is None or trainer.backend == "none":
        return []
    modules = {name: module for chunk in trainer.chunks for name, module in named_linears(chunk).items()}
    observer = Observer(run.precision_plan, modules, trainer.platform.device)
    return [PrecisionTelemetry(run.precision_every_steps, observer)]
