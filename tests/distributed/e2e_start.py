"""Starts of the real ``train.py`` on a recipe small enough for many of them, and ways to disturb one."""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]
WORLD_SIZE = 2
STEPS = 8
VOCABULARY = 64
SMALL = (
    "recipe=tiny",
    # Stochastic rounding: a restart that loses the generators' state shows.
    "precision=all_nvfp4",
    "precision.dtype=fp32",
    "model.pattern=ME*",
    "model.hidden_size=32",
    f"model.vocab_size={VOCABULARY}",
    "model.kv_channels=8",
    "model.mamba_num_heads=16",
    "model.mamba_head_dim=4",
    "model.mamba_state_dim=8",
    "model.mamba_chunk_size=16",
    "model.num_moe_experts=4",
    "model.moe_ffn_hidden_size=16",
    "model.moe_shared_expert_intermediate_size=16",
    "model.moe_latent_size=16",
    "stages.main.tokens=12 steps",
    "stages.main.seq_length=64",
    "stages.main.global_batch_size=8",
    "stages.main.micro_batch_size=2",
    f"max_steps={STEPS}",
    "optimizer.lr_warmup=2 steps",
    "optimizer.lr_wsd_decay=4 steps",
    "checkpoint.every=2 steps",
    "telemetry.eval_every=4 steps",
    "telemetry.eval_batches=1",
    "telemetry.tensorboard=false",
    "telemetry.wandb=disabled",
)


def write_corpus(prefix: Path, *, seed: int, documents: int = 40) -> None:
    """Random documents of 20 to 120 tokens, each ending with 0."""
    generator = np.random.default_rng(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in generator.integers(20, 120, documents):
        builder.add_document(np.append(generator.integers(1, VOCABULARY, length), 0), [int(length) + 1])
    builder.finalize(f"{prefix}.idx")


def write_corpora(folder: Path) -> Path:
    """Corpora ``train``, ``validation`` and ``more`` in ``folder``, which is returned."""
    for seed, name in enumerate(("train", "validation", "more")):
        write_corpus(folder / name, seed=seed)
    return folder


def overrides(run_dir: Path, data: Path, *more: str) -> list[str]:
    """The command line of a run on the corpora ``train`` and ``validation`` in ``data``;
    what ``more`` sets again replaces it."""
    usual = [*SMALL, f"run_dir={run_dir}", "data.tokenizer=null"]
    usual += [f"data.sources.train.path={data}/train", f"data.validation.validation.path={data}/validation"]
    values = dict(text.split("=", 1) for text in [*usual, *more])
    return [f"{key}={value}" for key, value in values.items()]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a start ended."""

    codes: tuple[int, ...]
    """Of each rank; of torchrun alone where it started them."""
    output: str


class Start:
    """One start of ``train.py``; whatever still runs at the end of the ``with`` block is killed."""

    def __init__(self, arguments: Sequence[str], *, torchrun: bool = False, ranks: int = WORLD_SIZE) -> None:
        """Start torchrun, or the ranks themselves with the environment that torchrun would give them."""
        self._torchrun = torchrun
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in __exit__)
        if torchrun:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
            self._processes = [self._popen([*launcher, "train.py", *arguments], {})]
            return
        world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        world |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
        self._processes = [
            self._popen(["train.py", *arguments], world | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()
        self._log.close()

    def signal_when(self, ready: Callable[[], bool], rank: int, number: signal.Signals, timeout_s: float = 120) -> None:
        """Signal one rank (with torchrun: its process group) at the moment when ``ready`` is first seen true."""
        deadline = time.monotonic() + timeout_s
        while not ready():
            assert all(process.poll() is None for process in self._processes), f"ended too soon:\n{self._output()}"
            assert time.monotonic() < deadline, f"the moment for the signal never came:\n{self._output()}"
            time.sleep(0.002)
        if self._torchrun:
            os.killpg(self._child(rank), number)
        else:
            self._processes[rank].send_signal(number)

    def wait(self, timeout_s: float = 180) -> Outcome:
        """Wait for all processes to end."""
        deadline = time.monotonic() + timeout_s
        codes = tuple(process.wait(max(deadline - time.monotonic(), 0.1)) for process in self._processes)
        return Outcome(codes, self._output())

    def _child(self, rank: int) -> int:
        children = psutil.Process(self._processes[0].pid).children()
        return next(child.pid for child in children if child.environ().get("RANK") == str(rank))

    def _output(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def _popen(self, arguments: Sequence[str], world: Mapping[str, str]) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", **world}
        command = [sys.executable, *arguments]
        return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=self._log, stderr=subprocess.STDOUT)


def ended(arguments: Sequence[str], *, torchrun: bool = False, ranks: int = WORLD_SIZE) -> Outcome:
    """An undisturbed start."""
    with Start(arguments, torchrun=torchrun, ranks=ranks) as start:
        return start.wait()


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Processes started inside cannot write files of more than ``size`` bytes: a full disk as they see it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def records(run_dir: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Complete lines of a record file; none when it is not there yet."""
    path = run_dir / name
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def checkpoints(run_dir: Path) -> list[str]:
    """Names in the checkpoint directory, unfinished ones too (without what makes theirs unique)."""
    folder = run_dir / "checkpoints"
    names = os.listdir(folder) if folder.exists() else []
    return sorted(re.sub(r"\.[0-9a-f]{8}\.partial$", ".partial", name) for name in names)
