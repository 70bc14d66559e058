"""Signals that ask the run to save and leave."""

from __future__ import annotations

import logging
import signal
from types import FrameType
from typing import Any

import torch

from nemotron3_megatron.train.callbacks.base import Callback, Progress, Stop

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preemption(Callback):
    """SIGTERM, SIGUSR1 or SIGUSR2 on any rank: all ranks stop together at the next step boundary.

    It listens from its construction on, so a signal while the model is built is answered after the first step.
    """

    def __init__(self, device: torch.device) -> None:
        self._flag = torch.zeros(1, dtype=torch.int32, device=device)
        self._previous: dict[signal.Signals, Any] = {number: signal.signal(number, self._receive) for number in SIGNALS}

    def wants_stop(self, step: int) -> Stop | None:
        everyone = self._flag.clone()
        torch.distributed.all_reduce(everyone, op=torch.distributed.ReduceOp.MAX)
        return Stop.PREEMPTED if everyone.item() else None

    def finished(self, progress: Progress, stop: Stop | None) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        _log.warning("received %s: saving at the next step boundary", signal.Signals(number).name)
        self._flag.fill_(1)
