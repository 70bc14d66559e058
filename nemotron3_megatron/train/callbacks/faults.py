"""Injected faults (``debug.fault``): what a cluster does to a run, at a step of one's choice."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from nemotron3_megatron.config.fault import Fault
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.train.callbacks.base import Callback, StepEvent

_log = logging.getLogger(__name__)

EXIT_STATUS = 3
"""Of the fault ``exit``; no other end of a run has it."""
SPIKE = 50.0


class InjectedFault(RuntimeError):
    """Of the fault ``exception``."""


class Faults(Callback):
    """The faults of one rank. A file in the run directory counts how often each has happened."""

    def __init__(self, faults: Sequence[Fault], run: Run, rank: int, decoders: Sequence[nn.Module]) -> None:
        """Prepare.

        Args:
            faults: of all ranks.
            run: gives the run directory.
            rank: of this process.
            decoders: of this rank's model chunks; nan, flip and spike change the last one's output.
        """
        self._faults = [fault for fault in faults if fault.rank == rank]
        self._folder = run.run_dir / "faults"
        self._decoder = decoders[-1]
        self._hooks: list[RemovableHandle] = []

    def before_step(self, step: int) -> None:
        for fault in self._faults:
            if fault.due(step) and self._may_happen(fault):
                _log.warning("injected fault in step %d: %s", step, fault.kind)
                self._happen(fault)

    def step_done(self, event: StepEvent) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _may_happen(self, fault: Fault) -> bool:
        """Count it before it happens: a killed process counts nothing."""
        path = self._path(fault)
        before = len(path.read_text(encoding="utf-8")) if path.exists() else 0
        if fault.times and before >= fault.times * fault.steps:
            return False
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write("x")
        return True

    def _path(self, fault: Fault) -> Path:
        return self._folder / f"{fault.kind}_rank{fault.rank}_step{fault.step}"

    def _happen(self, fault: Fault) -> None:
        match fault.kind:
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                os._exit(EXIT_STATUS)
            case "exception":
                raise InjectedFault(f"on rank {fault.rank} in step {fault.step}")
            case "sigterm":
                os.kill(os.getpid(), signal.SIGTERM)
            case "hang":
                while True:
                    time.sleep(1.0)
            case "freeze":
                ctypes.PyDLL(None).pause()  # PyDLL, unlike CDLL, keeps Python's lock
            case "slow":
                time.sleep(fault.seconds)
            case "nan" | "flip":
                self._change_output(torch.nan, once=fault.kind == "flip")
            case "spike":
                self._change_output(SPIKE, once=False)

    def _change_output(self, factor: float, *, once: bool) -> None:
        def hook(_module: nn.Module, _args: Any, output: Tensor) -> Tensor | None:
            if not output.requires_grad:  # validation
                return None
            if once:
                handle.remove()
            return output * factor

        handle = self._decoder.register_forward_hook(hook)
        self._hooks.append(handle)
