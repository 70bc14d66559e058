"""One node's torchrun with real rank processes: the status that torchrun turns into 1 comes back, and is recorded."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
from ports import free_port

from nemotron3_megatron.launch import jit_cache
from nemotron3_megatron.launch.exit_record import DIRECTORY
from nemotron3_megatron.launch.node import main
from nemotron3_megatron.launch.outcome import Outcome, read_outcome
from nemotron3_megatron.launch.segments import read_segments

SEGMENT = "12.0"
RANK = """
import os, signal, sys, time
rank = os.environ["RANK"]
assert os.environ["WORLD_SIZE"] == "2" and os.path.isdir(os.environ["NEMOTRON3_EXITS"])
what = dict(text.split("=") for text in sys.argv[1:]).get(rank, "0")
if what == "wait":
    time.sleep(60)
if what == "kernel":
    open(os.environ["NEMOTRON3_KERNEL_CACHE"] + "/compiled", "w").write(rank)
    what = "0"
if what == "raise":
    from nemotron3_megatron.launch.exit_record import recorded
    recorded(lambda arguments: 1 // 0, sys.argv)
if what.startswith("-"):
    os.kill(os.getpid(), -int(what))
sys.exit(int(what))
"""


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rank.py").write_text(RANK)
    settings = {"NEMOTRON3_SEGMENT": SEGMENT, "MASTER_ADDR": "127.0.0.1", "SLURM_NNODES": "1"}
    settings["MASTER_PORT"] = str(free_port())
    settings |= {"PYTHONPATH": str(Path(__file__).parents[3]), "SLURM_NODEID": "0", "SLURM_RESTART_COUNT": "0"}
    for name, value in (settings | {DIRECTORY: "", jit_cache.VARIABLE: "", "NEMOTRON3_JIT_CACHE": ""}).items():
        monkeypatch.setenv(name, value)
    return tmp_path


@pytest.mark.parametrize(
    ("ranks", "status", "outcome"),
    [
        (("0=0", "1=0"), 0, Outcome(0)),
        (("0=75", "1=75"), 75, Outcome(75)),
        (("0=wait", "1=75"), 75, Outcome(75)),
        (("0=wait", "1=2"), 2, Outcome(2, "exit code 2 without an exception", 1)),
        (("0=wait", "1=-9"), 1, Outcome(-9, "killed by SIGKILL (out of memory, or a lost node?)", 1)),
        (("0=wait", "1=raise"), 1, Outcome(1, "ZeroDivisionError: integer division or modulo by zero", 1)),
    ],
    ids=["done", "saved", "one saved first", "wrong input", "killed", "exception"],
)
def test_the_real_end_of_the_ranks_comes_back(
    run_dir: Path, ranks: tuple[str, ...], status: int, outcome: Outcome
) -> None:
    assert main([str(run_dir), "2", "--", str(run_dir / "rank.py"), *ranks]) == status
    found = read_outcome(run_dir, SEGMENT, status)
    host = socket.gethostname() if outcome.rank is not None else None
    assert found == Outcome(outcome.code, outcome.error, outcome.rank, host)
    (segment,) = read_segments(run_dir)
    assert (segment.name, segment.nodes) == (SEGMENT, 1)


def test_a_failure_of_torchrun_itself_is_told(run_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("", int(os.environ["MASTER_PORT"])))
        taken.listen()
        with pytest.raises(RuntimeError):
            main([str(run_dir), "2", "--", str(run_dir / "rank.py")])
    assert "EADDRINUSE" in read_outcome(run_dir, SEGMENT, 1).error


def test_kernels_are_kept_after_a_good_end_only(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = run_dir / "disk"
    disk.mkdir()
    monkeypatch.setenv("NEMOTRON3_JIT_CACHE", str(disk))
    archive = run_dir / jit_cache.ARCHIVE
    main([str(run_dir), "2", "--", str(run_dir / "rank.py"), "0=1"])
    assert not archive.exists()
    main([str(run_dir), "2", "--", str(run_dir / "rank.py"), "0=kernel"])
    assert archive.exists()
    assert not list(disk.iterdir()), "nothing stays on the node"
