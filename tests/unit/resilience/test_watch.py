"""Real processes that fail, hang or vanish: one root cause in words, and no process is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemotron3_megatron.resilience.board import Board, read_root_causes
from nemotron3_megatron.resilience.failure import Failure
from nemotron3_megatron.resilience.watch import Watch

RANK = """
import ctypes, os, sys, time
from pathlib import Path
from nemotron3_megatron.resilience.board import Board
from nemotron3_megatron.resilience.watch import Watch

def all_reduce():
    time.sleep(60)

def read_slowly():
    time.sleep(60)

def read_in_c():
    ctypes.PyDLL(None).sleep(60)  # holds Python's lock

def spawn():  # as well, and in uninterruptible sleep: the child waits for a writer
    os.mkfifo(folder / "fifo")
    opening = (os.POSIX_SPAWN_OPEN, 0, str(folder / "fifo"), os.O_RDONLY, 0)
    os.posix_spawn("/bin/true", ["true"], {}, file_actions=[opening])

folder, rank, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watch = Watch(Board(folder, rank, 2, "1"), {"step": 1.0}, poll_s=0.1, native_s=20.0 if what != "stuck" else 4.0)
watch.start()
watch.enter("step" if what != "waits long" else "save", 5, "main")
if what == "raises":
    try:
        raise ValueError("broken on\\nrank %d" % rank)
    except ValueError as error:
        watch.fail(error)
if what == "lost":
    time.sleep(0.3)
    watch.fail(RuntimeError("Connection closed by peer"))
if what != "vanishes":
    {"hangs": read_slowly, "holds": read_in_c, "stuck": spawn}.get(what, all_reduce)()
"""


def start(folder: Path, *ranks: str) -> tuple[list[int], str]:
    """Exit codes and joined standard error of two processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    errors = [folder / f"stderr_{rank}" for rank in range(len(ranks))]
    processes = []
    for rank, what in enumerate(ranks):
        command = [sys.executable, "-c", RANK, str(folder), str(rank), what]
        with errors[rank].open("w") as file:
            processes.append(subprocess.Popen(command, env=environment, stderr=file))
    codes = [process.wait(timeout=90) for process in processes]
    return codes, "".join(path.read_text() for path in errors)


def cause(folder: Path) -> Failure:
    (found,) = read_root_causes(folder)
    return found


def test_an_exception_ends_the_others_quietly(tmp_path: Path) -> None:
    codes, errors = start(tmp_path, "waits long", "raises")
    assert codes == [1, 1]
    assert errors.count("failed: rank 1 of 2") == 1
    found = cause(tmp_path)
    assert (found.kind, found.rank, found.step, found.error) == ("exception", 1, 5, "ValueError: broken on rank 1")


def test_no_secret_is_shown_or_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "broken on")
    _, errors = start(tmp_path, "raises", "waits long")
    assert "ValueError: <HF_TOKEN> rank 0" in errors
    assert "broken" not in errors
    assert not [path for path in (tmp_path / "failures").rglob("*") if path.is_file() and "broken" in path.read_text()]


def test_both_raise_and_one_speaks(tmp_path: Path) -> None:
    codes, errors = start(tmp_path, "raises", "raises")
    assert codes == [1, 1]
    assert errors.count("failed: rank") == 1


def test_a_hang_leaves_the_stack_of_every_rank(tmp_path: Path) -> None:
    """Also of a rank whose own phase has no limit; which is to blame cannot be told here, only the places."""
    codes, errors = start(tmp_path, "waits long", "hangs")
    assert codes == [1, 1]
    assert errors.count("failed: rank") == 1
    found = cause(tmp_path)
    assert found.kind == "hang"
    assert "read_slowly" in found.others
    assert "all_reduce" in found.others
    stacks = {path.name: path.read_text() for path in (tmp_path / "stacks" / "1").iterdir()}
    assert set(stacks) == {f"rank_0000{rank}{kind}.txt" for rank in (0, 1) for kind in ("", "_native")}
    assert "all_reduce" in stacks["rank_00000.txt"]
    assert "read_slowly" in stacks["rank_00001.txt"]
    assert "state S, in " in stacks["rank_00001.txt"], "what the kernel knows of each thread"
    assert native(tmp_path, 1).startswith(("native stacks (", "no native stacks: "))


@pytest.mark.parametrize(("what", "code"), [("hangs", 1), ("holds", -signal.SIGKILL)])
def test_a_hang_ends_when_nobody_reads_stderr(tmp_path: Path, what: str, code: int) -> None:
    """Whoever has to speak before it ends the rank, the watch or the process beside it."""
    reader, stderr = os.pipe()
    os.close(reader)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", RANK, str(tmp_path), "0", what]
    with subprocess.Popen(command, env=environment, stdout=stderr, stderr=stderr) as process:
        os.close(stderr)
        assert process.wait(timeout=90) == code
    assert cause(tmp_path).kind == "hang"


def native(folder: Path, rank: int) -> str:
    return (folder / "stacks" / "1" / f"rank_{rank:05d}_native.txt").read_text()


def test_a_rank_that_holds_pythons_lock_is_named_dumped_and_ended(tmp_path: Path) -> None:
    """Its own threads stand still; the process beside it finds the hang, speaks for it and ends it."""
    codes, errors = start(tmp_path, "holds", "waits long")
    assert codes == [-signal.SIGKILL, 1]
    assert errors.count("failed: rank") == 1
    assert f"stacks: {tmp_path}/stacks/1" in errors
    found = cause(tmp_path)
    assert (found.kind, found.rank, found.step, found.stage, found.phase) == ("hang", 0, 5, "main", "step")
    assert found.error.startswith("no progress within 1 s; native code has held Python's lock for")
    assert "in read_in_c" in found.stack.splitlines()[-1], "Python's frames, innermost last"
    assert "read_in_c" in (tmp_path / "stacks" / "1" / "rank_00000.txt").read_text()
    assert "rank 1: step 5, save: all_reduce" in found.others
    if not native(tmp_path, 0).startswith("no native stacks"):
        assert "nanosleep" in native(tmp_path, 0), "the C function that it is in"


def test_both_hold_it(tmp_path: Path) -> None:
    """Nobody is left but the processes beside the ranks; one of them is uninterruptible besides."""
    codes, errors = start(tmp_path, "holds", "stuck")
    os.close(os.open(tmp_path / "fifo", os.O_WRONLY | os.O_NONBLOCK))  # its child goes on, and ends
    assert codes == [-signal.SIGKILL, -signal.SIGKILL]
    assert errors.count("failed: rank") == 1
    assert "rank 0: step 5, step: read_in_c" in cause(tmp_path).others
    assert "rank 1: step 5, step: spawn" in cause(tmp_path).others
    assert ": state D, in " in (tmp_path / "stacks" / "1" / "rank_00001.txt").read_text()


def test_the_process_beside_a_rank_ends_with_it(tmp_path: Path) -> None:
    program = "import os, sys; from nemotron3_megatron.resilience.watch import Watch; " + (
        "from nemotron3_megatron.resilience.board import Board; from pathlib import Path; "
        "watch = Watch(Board(Path(sys.argv[1]), 0, 1, '1'), {}, poll_s=0.1); watch.start(); "
        "print(watch._sentry._process.pid, flush=True); os._exit(0)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    stat = Path(f"/proc/{done.stdout.strip()}/stat")
    for _ in range(100):
        if not stat.exists() or ") Z " in stat.read_text():  # gone, or its new parent has not noticed yet
            return
        time.sleep(0.1)
    pytest.fail("still there")


def test_a_rank_that_vanished_is_named(tmp_path: Path) -> None:
    codes, _ = start(tmp_path, "lost", "vanishes")
    assert codes == [1, 0]
    found = cause(tmp_path)
    assert (found.kind, found.rank) == ("lost_rank", 1)


def test_an_earlier_start_of_the_same_name_is_not_believed(tmp_path: Path) -> None:
    """Its files are old; a start that believed them would end at once."""
    board = Board(tmp_path, 0, 2, "1")
    board.folder.mkdir(parents=True)
    old = board.folder / "root_cause.json"
    old.write_text(json.dumps({"kind": "hang"}))
    assert board.decided()
    os.utime(old, (1.0, 1.0))
    assert not board.decided()


def test_a_phase_inside_a_phase(tmp_path: Path) -> None:
    watch = Watch(Board(tmp_path, 0, 1, "1"), {})
    watch.enter("step", 3, "main")
    before = watch._place
    with watch.during("save"):
        assert (watch._place.phase, watch._place.step) == ("save", 3)
    assert watch._place.phase == "step"
    assert watch._place.since > before.since, "the time of a save is not the step's"


@pytest.mark.parametrize("kind", ["exception", "hang"])
def test_one_rank_alone_decides(kind: str, tmp_path: Path) -> None:
    board = Board(tmp_path, 0, 1, "1")
    failure = Failure(
        kind=kind,  # type: ignore[arg-type]
        rank=0,
        host="h",
        step=1,
        stage="s",
        phase="step",
        error="e",
        stack="",
        time_s=1.0,
        world_size=1,
    )
    found = board.report(failure)
    assert found is not None
    assert found.error == "e"
    assert board.decided()
