"""The checkpoint worker: one process per rank that writes what the training process has staged.

Megatron-Core 0.19.2 has one (``dist_checkpointing/strategies/async_utils.py``), deprecated in favour of
nvidia-resiliency-ext's. It is not used: a training process whose worker died waits for it for ever (:415, :372), it
needs a CUDA device (:514), and errors reach the training process without their cause (``filesystem_async.py``:307).

``python -m nemotron3_megatron.checkpoint.worker CONNECTION MEMORY MAIL`` (file descriptors). It starts without
importing the training script, lives until its parent closes the connection or dies, and leaves signals to its parent.
"""

from __future__ import annotations

import io
import os
import pickle
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path

import torch
from torch.distributed.checkpoint.planner import SavePlan

from nemotron3_megatron.checkpoint.manifest import Sample
from nemotron3_megatron.checkpoint.planning import Shards
from nemotron3_megatron.checkpoint.staging import Staged, Staging, room
from nemotron3_megatron.checkpoint.writing import Written, system_error, take_samples, write


class WorkerDied(Exception):
    """The worker is gone; what it was writing is lost, what it had finished is not."""


@dataclass(frozen=True, slots=True)
class _Job:
    directory: Path
    plan: bytes
    """A pickled ``SavePlan``: the same in every save of a run, and most of a job."""
    places: list[Staged | bytes]
    samples: tuple[Sample, ...]


class Worker:
    """The training process's end: at most one job at a time."""

    def __init__(self) -> None:
        """Start the process; it gets ready while training goes on."""
        self._staging = Staging()
        self._mail = Staging()
        mine, its = Pipe()
        with its:
            descriptors = (its.fileno(), self._staging.descriptor, self._mail.descriptor)
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, *map(str, descriptors)],
                pass_fds=descriptors,
                stdin=subprocess.DEVNULL,
                # It computes nothing: no GPU, and no threads that compete with training's.
                env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
            )
        self._connection = mine
        self._plan: tuple[SavePlan, bytes] | None = None

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def expect(self, shards: Shards) -> None:
        """Get ready for saves like this one: memory, and the plan in the form in which it is sent."""
        self._staging.reserve(room(shards.data))
        self._sent(shards.plan)

    def submit(self, directory: Path, shards: Shards, seed: int) -> None:
        """Copy the live tensors and have them written; when this returns they may change.

        Raises:
            WorkerDied: nothing was started.
        """
        places = self._staging.put(shards.data)
        # Taken from the live tensors after the copy, so that a copy that came too late or too early is found.
        samples = take_samples(shards.plan, shards.data, seed)
        job = pickle.dumps(_Job(directory, self._sent(shards.plan), places, samples))
        # Through memory: a pipe would make training wait for a process that is still starting.
        (letter,) = self._mail.put([torch.frombuffer(bytearray(job), dtype=torch.uint8)])
        try:
            self._connection.send(letter)
        except OSError as error:
            raise WorkerDied(self._ending()) from error

    def ready(self) -> bool:
        """Whether :meth:`result` would return, or raise, at once."""
        return self._connection.poll(0)

    def result(self) -> Written:
        """Wait for the job.

        Raises:
            WorkerDied: it will never be done.
            OSError: as of :func:`.writing.write`.
            ValueError: as of :func:`.writing.write`.
        """
        try:
            outcome: Written | Exception = self._connection.recv()
        except (EOFError, OSError) as error:
            raise WorkerDied(self._ending()) from error
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        """End the process, after the job it has."""
        self._connection.close()
        self._process.wait()
        self._staging.close()
        self._mail.close()

    def _sent(self, plan: SavePlan) -> bytes:
        """Pickled once: that takes longer than all else that a save does to it."""
        if self._plan is None or self._plan[0] is not plan:
            self._plan = plan, pickle.dumps(plan)
        return self._plan[1]

    def _ending(self) -> str:
        code = self._process.wait()
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def main(connection: Connection, staging: Staging, mail: Staging) -> None:
    """The worker's life: one job after the other, until its parent is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(10)  # training comes first
    torch.set_num_threads(1)
    while True:
        try:
            letter: Staged = connection.recv()
        except (EOFError, OSError):
            return
        outcome = _done(pickle.loads(mail.get(letter).numpy().tobytes()), staging)
        with suppress(OSError):  # nobody is left to tell
            connection.send(outcome)


def _done(job: _Job, staging: Staging) -> Written | Exception:
    data = [io.BytesIO(place) if isinstance(place, bytes) else staging.get(place) for place in job.places]
    try:
        return write(job.directory, pickle.loads(job.plan), data, job.samples)
    except (OSError, ValueError) as error:
        return error
    except Exception as error:
        return system_error(error)


if __name__ == "__main__":
    main(Connection(int(sys.argv[1])), Staging(int(sys.argv[2])), Staging(int(sys.argv[3])))
