"""A run from start to exit code; read this first."""

from __future__ import annotations

import logging
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from nemotron3_megatron.checkpoint.huggingface.start import is_imported, start_from_weights
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.data.training import TrainingData, ValidationData
from nemotron3_megatron.parallel.groups import start_groups, stop_groups
from nemotron3_megatron.platform import select
from nemotron3_megatron.precision.lowering.names import named_linears
from nemotron3_megatron.precision.observe import Observer
from nemotron3_megatron.resilience.watch import Watch
from nemotron3_megatron.telemetry.writers import Writer, build_writers
from nemotron3_megatron.train.build import build_trainer
from nemotron3_megatron.train.callbacks.base import Callback, Progress, StepEvent, Stop
from nemotron3_megatron.train.callbacks.checkpointing import Checkpointing, Saves
from nemotron3_megatron.train.callbacks.precision import PrecisionTelemetry
from nemotron3_megatron.train.callbacks.preemption import Preemption
from nemotron3_megatron.train.callbacks.recording import Recording, Validation
from nemotron3_megatron.train.callbacks.samples import SampleLog
from nemotron3_megatron.train.loop import run_steps
from nemotron3_megatron.train.loss import Losses
from nemotron3_megatron.train.minding import Minding, mind
from nemotron3_megatron.train.record import write_run_record
from nemotron3_megatron.train.stages import Boundaries, Side, check_continues, warn_of_rate
from nemotron3_megatron.train.step import Trainer, evaluate

_log = logging.getLogger(__name__)

EXIT_DONE = 0
EXIT_START_AGAIN = 75
"""Saved, and wants to be started again (EX_TEMPFAIL of sysexits.h)."""


def train(run: Run, watch: Watch) -> int:
    """Train under torchrun until the run's target, resuming from its newest checkpoint.

    Returns:
        The process exit code: EXIT_DONE, or EXIT_START_AGAIN after a preemption or
        at the end of a stage, if the next one has another layout or precision.

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
    store.claim()
    progress, last_step = _restore(trainer, data, store)
    if torch.distributed.get_rank() == 0:
        write_run_record(run, platform, trainer.backend)
    boundaries = Boundaries(run, lambda: data.state_dict()["drawn"], last_step, _console())
    minding = mind(trainer, watch, store)
    callbacks = [preemption, *minding.first, *_callbacks(trainer, data, store, progress, boundaries, minding)]
    stop = run_steps(minding.trainer, data, progress, [*callbacks, *minding.last])
    data.close()
    store.release()
    trainer.release()
    # Not after an error: other ranks may be waiting in a collective that will never come.
    stop_groups()
    return EXIT_START_AGAIN if stop in (Stop.PREEMPTED, Stop.NEXT_LAYOUT) else EXIT_DONE


def _restore(trainer: Trainer, data: TrainingData, store: CheckpointStore) -> tuple[Progress, Side | None]:
    """Continue from the run's newest complete checkpoint, else from ``checkpoint.load``, else start anew.

    Returns:
        How far the run is, and what the checkpoint knows of its last step.
    """
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
        return Progress(), None
    source = newest or Path(str(options.load))
    if newest is None and is_imported(source):
        start_from_weights(store, source, trainer.chunks, trainer.optimizer)
        return Progress(), None
    state = store.load(source, trainer.chunks, trainer.optimizer)
    check_continues(trainer.run, source, state["step"], state["tokens"])
    data.load_state_dict(state["data"], allow_data_change=options.allow_data_change)
    if rank_zero:
        warn_of_rate(trainer.run, state)
        before, plan = state.get("precision"), trainer.run.precision_plan
        if before is not None and before["fingerprint"] != plan.fingerprint:
            was, now = before["name"], trainer.run.precision.name
            _log.warning("the precision plan is not the checkpoint's: %s until here, %s from here on", was, now)
        _log.info("continuing from %s at step %d", source, state["step"])
    if not trainer.run.can_train(stage := trainer.run.stage_at(state["step"])):
        why = f"it is of stage {stage.name}, and this start began for another one's layout"
        raise UserError(f"checkpoint {source}", why=why, nearest="the same command again")
    return Progress(step=state["step"]), state.get("last_step")


def _console() -> Console | None:
    return Console() if torch.distributed.get_rank() == 0 else None


def _callbacks(
    trainer: Trainer,
    data: TrainingData,
    store: CheckpointStore,
    progress: Progress,
    boundaries: Boundaries,
    minding: Minding,
) -> list[Callback]:
    """In the order in which they act after a step; they finish in reverse, so the last save finds writers open."""
    run, groups = trainer.run, trainer.groups
    rank_zero = torch.distributed.get_rank() == 0
    writers: list[Writer] = build_writers(run, progress.step or None) if rank_zero else []
    held_out = ValidationData(run, groups.dp.rank(), groups.dp.size(), groups.cp.rank(), groups.cp.size())

    def state_of(step: int) -> dict[str, Any]:
        for writer in writers:
            writer.sync()
        return {
            "step": step,
            "tokens": run.tokens_at(step),
            "data": data.state_dict(),
            "last_step": boundaries.last_step,
            "precision": {"name": run.precision.name, "fingerprint": run.precision_plan.fingerprint},
        }

    saves = Saves(trainer, store, state_of)

    def held_out_losses(event: StepEvent) -> Losses:
        losses = evaluate(trainer, held_out.batches(event.stage), event.stage)
        saves.measured(event.step, losses.depths[0])
        return losses

    observed = _precision_telemetry(trainer)
    return [
        boundaries,
        *([SampleLog(run, lambda: data.samples)] if rank_zero and run.telemetry.samples else []),
        *observed,
        Recording(
            run,
            trainer.platform,
            writers,
            backend=trainer.backend,
            operands=observed[0].records if observed else tuple,
            health=minding.health,
        ),
        Validation(run, minding.evaluating(held_out_losses), writers, health=minding.health),
        Checkpointing(run, minding.saving(saves), saves),
    ]


def _precision_telemetry(trainer: Trainer) -> list[PrecisionTelemetry]:
    """Empty where nothing is quantised or observed."""
    run = trainer.run
    if run.telemetry.precision_every is None or trainer.backend == "none":
        return []
    modules = {name: module for chunk in trainer.chunks for name, module in named_linears(chunk).items()}
    observer = Observer(run.precision_plan, modules, trainer.platform.device)
    return [PrecisionTelemetry(partial(run.is_due, run.telemetry.precision_every), observer)]
