"""Run a test function on several ranks: real processes, a real rendezvous, JSON in and out.

In a test::

    losses = run_ranks(train, 2, ep=2)        # train(ep=2) on 2 ranks -> what each rank returned

The function must be at the top level of a file; its file is imported by each rank (with its folder on
``sys.path``), so test files keep rank functions beside the tests or in a module of their own.
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ports import free_port

REPOSITORY = Path(__file__).resolve().parents[2]


class RanksFailed(AssertionError):
    """Some rank exited with an error or ran past the time limit; the message holds what they wrote."""

    def __init__(self, message: str, exit_codes: list[int]) -> None:
        super().__init__(message)
        self.exit_codes = exit_codes


def run_ranks(
    function: Callable[..., Any], nproc: int, *, timeout_s: float = 240, env: Mapping[str, str] | None = None, **kw: Any
) -> list[Any]:
    """Call ``function(**kw)`` on ``nproc`` ranks and return the results in rank order.

    Args:
        function: top-level function; arguments and result must be JSON.
        nproc: world size; RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT are set as by torchrun.
        timeout_s: all ranks are killed after this long.
        env: further environment variables.

    Raises:
        RanksFailed: a rank failed (the others are then killed after a grace period) or time ran out.
    """
    source = inspect.getsourcefile(function)
    assert source is not None
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "job.json"
        job.write_text(json.dumps({"file": source, "function": function.__name__, "arguments": kw}))
        port = free_port()
        ranks = [_start(job, rank, nproc, port, env) for rank in range(nproc)]
        late = _wait(ranks, timeout_s)
        codes = [rank.process.returncode for rank in ranks]
        if late or any(codes):
            raise RanksFailed(_report(ranks, late, timeout_s), codes)
        return [json.loads(rank.result.read_text()) for rank in ranks]


@dataclass(frozen=True, slots=True)
class _Rank:
    process: subprocess.Popen[bytes]
    result: Path
    log: Path


def _start(job: Path, rank: int, world_size: int, port: int, env: Mapping[str, str] | None) -> _Rank:
    result, log = job.with_name(f"result{rank}.json"), job.with_name(f"log{rank}.txt")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",  # so that the end of a log is the error
        "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")]),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        **(env or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, __file__, str(job), str(result)], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    return _Rank(process, result, log)


def _wait(ranks: list[_Rank], timeout_s: float, grace_s: float = 10) -> bool:
    """Wait for all ranks; kill what is left when time is up, or ``grace_s`` after the first failure."""
    deadline = time.monotonic() + timeout_s
    failed = False
    while any(rank.process.poll() is None for rank in ranks):
        if not failed and any(rank.process.poll() for rank in ranks):
            failed, deadline = True, min(deadline, time.monotonic() + grace_s)
        if time.monotonic() > deadline:
            for rank in ranks:
                rank.process.kill()
                rank.process.wait()
            return not failed
        time.sleep(0.02)
    return False


def _report(ranks: list[_Rank], late: bool, timeout_s: float) -> str:
    lines = [f"{len(ranks)} ranks " + (f"ran past {timeout_s} s" if late else "failed")]
    for number, rank in enumerate(ranks):
        code = rank.process.returncode
        ending = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        lines.append(f"--- rank {number}: {ending}\n{rank.log.read_text(errors='replace')[-4000:]}")
    return "\n".join(lines)


def _rank_main(job: Path, result: Path) -> None:
    """In the child: import the function's file, call it, write what it returns."""
    import nemotron3_megatron  # noqa: F401  (before any Megatron-Core import: it installs the CPU platform)

    document = json.loads(job.read_text())
    source = Path(document["file"])
    sys.path.insert(0, str(source.parent))
    spec = importlib.util.spec_from_file_location(source.stem, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module
    spec.loader.exec_module(module)
    value = getattr(module, document["function"])(**document["arguments"])
    result.write_text(json.dumps(value))


if __name__ == "__main__":
    _rank_main(Path(sys.argv[1]), Path(sys.argv[2]))
