"""Forward and backward of a global batch as one CUDA graph.

A step of a model slice is some thousand kernels of 50 microseconds; Python and its launches take as long again, and
the GPU waits. A graph is launched once. It holds addresses, so inputs are copied into tensors of its own, and whatever
decides by values on the CPU stays outside: counting tokens, the update.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.graphs import why_no_graph
from nemotron3_megatron.config.run import Run
from nemotron3_megatron.model.builder import chosen_spec
from nemotron3_megatron.model.rooms import Rooms, rooms_of
from nemotron3_megatron.platform import Platform
from nemotron3_megatron.precision.backend import Backend

_log = logging.getLogger(__name__)

EAGER_STEPS = 2
"""Before the capture: kernels are tuned, buffers made and lazy imports done by then."""


@dataclass(frozen=True, slots=True)
class _Capture:
    graph: torch.cuda.CUDAGraph
    inputs: list[Tensor]
    output: Tensor


class CapturedPasses:
    """Runs a function of tensors, from the third call on as a CUDA graph."""

    def __init__(self, rooms: Rooms) -> None:
        """``rooms``: of the experts inside the function."""
        self.rooms = rooms
        self.unsee: Callable[[], None] | None = None
        """Set while hooks look at the calls, of which a graph holds only what they did at its capture: drops what they
        saw, where a call does not count."""
        self._calls = 0
        self._captures: dict[tuple[bool, tuple[torch.Size, ...]], _Capture] = {}
        """By whether hooks look and the inputs' shapes; they share one memory pool, since no two run at a time."""

    def __call__(self, passes: Callable[[list[Tensor]], Tensor], inputs: Sequence[Tensor]) -> Tensor:
        """``passes(inputs)``; always the same function.

        Args:
            passes: works on the GPU only, and puts all else that it changes into tensors that outlive the call.
            inputs: on the GPU.

        Returns:
            Its result, which the next call overwrites.
        """
        self._calls += 1
        self.rooms.watch()
        if self._calls <= EAGER_STEPS:
            return passes(list(inputs))
        kind = (self.unsee is not None, tuple(tensor.shape for tensor in inputs))
        if kind not in self._captures:
            self._captures[kind] = self._capture(passes, inputs)
        capture = self._captures[kind]
        torch._foreach_copy_(capture.inputs, list(inputs))
        capture.graph.replay()
        return capture.output

    def make_room(self) -> None:
        """After a call in which experts got more rows than a graph has room for: the next one is not replayed, and
        the graphs are made anew after it."""
        if torch.distributed.get_rank() == 0:
            _log.info("experts got more rows than a CUDA graph had room for: the step is computed again without it")
        if self.unsee is not None:
            self.unsee()
        self.rooms.widen()
        self.release()
        self._calls = EAGER_STEPS - 1

    def release(self) -> None:
        """Give up the graphs. NCCL lets no communicator go that one of them uses: before process groups are stopped."""
        torch.cuda.synchronize()
        self._captures.clear()

    def _capture(self, passes: Callable[[list[Tensor]], Tensor], inputs: Sequence[Tensor]) -> _Capture:
        own = [tensor.clone() for tensor in inputs]
        graph = torch.cuda.CUDAGraph()
        pool = next((capture.graph.pool() for capture in self._captures.values()), None)
        torch.cuda.synchronize()
        # NCCL's watchdog thread may ask for events meanwhile.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            output = passes(own)
        return _Capture(graph, own, output)


def captured_passes(
    run: Run, platform: Platform, backend: Backend, chunks: Sequence[nn.Module]
) -> CapturedPasses | None:
    """What ``parallel.cuda_graph`` means for this run and model on this machine; None: no graph.

    Raises:
        UserError: a graph was asked for and is impossible.
    """
    obstacle = why_no_graph(run, spec=chosen_spec(run.model, platform), backend=backend)
    if platform.name == "cpu":
        obstacle = "there is no GPU"
    if not obstacle:
        return CapturedPasses(rooms_of(chunks))
    if run.parallel.cuda_graph == "passes":
        raise UserError("parallel.cuda_graph=passes", why=obstacle, nearest="parallel.cuda_graph=auto")
    if platform.name == "cuda" and torch.distributed.get_rank() == 0:
        _log.info("no CUDA graph: %s", obstacle)
    return None
