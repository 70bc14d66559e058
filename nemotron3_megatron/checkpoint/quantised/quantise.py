"""``nemotron3 quantise``: post-training quantisation by ModelOpt, and distillation after it."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from nemotron3_megatron.checkpoint.huggingface.export import write_model
from nemotron3_megatron.checkpoint.huggingface.shards import Item
from nemotron3_megatron.checkpoint.quantised import layout
from nemotron3_megatron.checkpoint.quantised.model_reader import ModelReader
from nemotron3_megatron.checkpoint.quantised.published import (
    LEARNING_RATE,
    SEQUENCES,
    Settings,
    attention_layers,
    narrow_linears,
)
from nemotron3_megatron.checkpoint.quantised.sequences import logits_of, sequences_after
from nemotron3_megatron.checkpoint.store import CheckpointStore
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.words import options_of
from nemotron3_megatron.data.batch import MicroBatch
from nemotron3_megatron.evaluate.trained import Loaded, loaded
from nemotron3_megatron.model.builder import build_model, model_sharded_state
from nemotron3_megatron.platform import select
from nemotron3_megatron.platform.base import Spec

BATCH = 16
"""Sequences of a step of distillation, unless given."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Of ``nemotron3 quantise``."""

    checkpoint: Path
    out: Path
    settings: Settings = "nvfp4"
    search: Literal["mse", "max"] = "mse"
    """How the scales of NVFP4 weights are found (``calibration.Search``)."""
    sequences: int | None = None
    """Of the calibration; None: as many as published."""
    seq_length: int | None = None
    """Tokens of a sequence; None: as in the checkpoint's next step."""
    distil_steps: int = 0
    """Steps of quantisation-aware distillation after the calibration."""
    distil_batch: int = BATCH
    """Sequences of such a step."""
    distil_lr: float = LEARNING_RATE
    tokenizer: str | None = None
    """None: the one named in the run; "none": write without."""
    shard_gb: float = 4.0

    def __post_init__(self) -> None:
        for name in ("sequences", "seq_length", "distil_batch", "distil_lr", "shard_gb"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name}={value}", where="command line", why="is not positive")
        if self.distil_steps < 0:
            raise UserError(f"distil_steps={self.distil_steps}", where="command line", why="is negative")
        for name, value, default in (
            ("distil_batch", self.distil_batch, BATCH),
            ("distil_lr", self.distil_lr, LEARNING_RATE),
        ):
            if value != default and not self.distil_steps:
                why = "has no effect without distillation"
                raise UserError(f"{name}={value}", where="command line", why=why, nearest="distil_steps=N")


def quantise_main(overrides: Sequence[str]) -> int:
    """Quantise a checkpoint; prints where.

    Raises:
        UserError: an option, the checkpoint or its data cannot be used, or ModelOpt is not installed.
    """
    options: Options = options_of(Options, overrides)
    if importlib.util.find_spec("modelopt") is None:
        why = "is not installed; it comes with the extra [cuda], `make env-cuda`"
        raise UserError("nvidia-modelopt", why=why, nearest="nemotron3 export format=quantised, which does without it")
    quantise(options)
    sys.stdout.write(f"{options.out}\n")
    return 0


def quantise(options: Options, spec: Spec | None = None) -> Path:
    """Calibrate a checkpoint's model on the data that its run would have gone on with, and write it.

    Args:
        options: as on the command line.
        spec: implementation of the modules; None: as the run says.

    Returns:
        ``options.out``.

    Raises:
        UserError: as :func:`quantise_main`.
    """
    with loaded(options.checkpoint, spec) as found:
        return write_model(
            options.out,
            found.run,
            lambda directory: _contents(options, found, directory),
            tokenizer=options.tokenizer,
            shard_bytes=int(options.shard_gb * 1e9),
        )


def _contents(options: Options, found: Loaded, directory: Path) -> tuple[Iterator[Item], dict[str, Any]]:
    from nemotron3_megatron.checkpoint.quantised.calibrated import calibrated_items, descriptions
    from nemotron3_megatron.checkpoint.quantised.calibration import calibrate

    architecture = found.run.model
    formats = narrow_linears(architecture, options.settings)
    require_device(options, found.device, "nvfp4" in formats.values())
    # ModelOpt adds names of its own to what the converted model says of itself.
    reader = ModelReader(model_sharded_state(found.model, found.groups))
    with sequences_after(found.run, found.state, options.seq_length) as batches:
        sample = islice(batches, options.sequences or SEQUENCES[options.settings])
        calibrate(
            found.model,
            options.settings,
            options.search,
            formats,
            attention_layers(architecture),
            lambda model: _read(found, model, sample),
        )
        if options.distil_steps:
            _distil(options, found, batches)
    own_file, in_config = descriptions(architecture, formats)
    (directory / layout.DESCRIPTION).write_text(json.dumps(own_file, indent=2) + "\n", encoding="utf-8")
    return calibrated_items(found.model, reader, architecture, formats), {"quantization_config": in_config}


def require_device(options: Options, device: torch.device, has_nvfp4: bool) -> None:
    """Refuse what ModelOpt's Triton kernels are needed for: on a CPU, largest magnitudes can be found, and no more.

    Raises:
        UserError: rounding to NVFP4 on a CPU.
    """
    if device.type == "cpu" and has_nvfp4 and (options.search == "mse" or options.distil_steps):
        wants = "search=mse" if options.search == "mse" else f"distil_steps={options.distil_steps}"
        nearest = "search=max without distil_steps, or settings=fp8"
        raise UserError(wants, where="command line", why="ModelOpt rounds to NVFP4 on CUDA only", nearest=nearest)


def _read(found: Loaded, model: nn.Module, batches: Iterator[MicroBatch]) -> None:
    logits = logits_of(found.run, found.device)
    with torch.no_grad():
        for batch in batches:
            logits(model, batch)


def _distil(options: Options, found: Loaded, batches: Iterator[MicroBatch]) -> None:
    from nemotron3_megatron.checkpoint.quantised.distillation import Distillation, distil

    (teacher,) = build_model(found.run, select("auto"), found.groups)
    CheckpointStore(found.run.run_dir).load(options.checkpoint, [teacher], None)
    teacher.eval()
    rule = Distillation(steps=options.distil_steps, batch=options.distil_batch, lr=options.distil_lr)
    logits = logits_of(found.run, found.device)
    distil(found.model, teacher, rule, found.run.optimizer, batches, logits)
