"""A run's trainer: model, precision, data parallelism, optimizer, in this order."""

from __future__ import annotations

from megatron.core.process_groups_config import ProcessGroupCollection

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.builder import build_model
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.precision.install import backend_of, install_precision
from nemotron3_megatron.train.graph import captured_passes
from nemotron3_megatron.train.optimizer import build_optimizer, wrap_data_parallel
from nemotron3_megatron.train.step import Trainer, configure_schedule
from nemotron3_megatron.train.updates import choose_updates


def build_trainer(run: Run, platform: Platform, groups: ProcessGroupCollection) -> Trainer:
    """Everything that a step works on, with fresh weights.

    Raises:
        UserError: this device or module spec cannot do what the recipe asks for.
    """
    backend = backend_of(run, platform)
    chunks = build_model(run, platform, groups, backend)
    install_precision(run, platform, chunks, backend)
    captured = captured_passes(run, platform, backend, chunks)
    model = wrap_data_parallel(chunks, run, groups)
    optimizer = build_optimizer(model, run, groups)
    trainer = Trainer(run, platform, groups, model, optimizer, choose_updates(optimizer), backend, captured)
    configure_schedule(trainer)
    return trainer
