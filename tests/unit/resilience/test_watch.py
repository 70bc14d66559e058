"""Real processes that fail, hang or vanish: one root cause in words, and no process is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron3_megatron.resilience.board import Board, read_root_causes
from nemotron3_megatron.resilience.failure import Failure
from nemotron3_megatron.resilience.watch import Watch

RANK = """
import sys, time
from pathlib import Path
from nemotron3_megatron.resilience.board import Board
from nemotron3_megatron.resilience.watch import Watch

def all_reduce():
    time.sleep(60)

def read_slowly():
    time.sleep(60)

folder, rank, what = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
watch = Watch(Board(folder, rank, 2, {"MASTER_PORT": "1"}), {"step": 1.0}, poll_s=0.1)
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
    read_slowly() if what == "hangs" else all_reduce()
"""


def start(folder: Path, *ranks: str) -> tuple[list[int], str]:
    """Exit codes and joined standard error of two processes."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder), str(rank), what],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, what in enumerate(ranks)
    ]
    errors = [process.communicate(timeout=50)[1] for process in processes]
    return [process.returncode for process in processes], "".join(errors)


def cause(folder: Path) -> Failure:
    (found,) = read_root_causes(folder)
    return found


def test_an_exception_ends_the_others_quietly(tmp_path: Path) -> None:
    codes, errors = start(tmp_path, "waits long", "raises")
    assert codes == [1, 1]
    assert errors.count("failed: rank 1 of 2") == 1
    found = cause(tmp_path)
    assert (found.kind, found.rank, found.step, found.error) == ("exception", 1, 5, "ValueError: broken on rank 1")


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
    stacks = [path.read_text() for path in sorted((tmp_path / "stacks" / "1").iterdir())]
    assert "all_reduce" in stacks[0]
    assert "read_slowly" in stacks[1]
    assert "state S, in " in stacks[1], "what the kernel knows of each thread"


def test_a_rank_that_vanished_is_named(tmp_path: Path) -> None:
    codes, _ = start(tmp_path, "lost", "vanishes")
    assert codes == [1, 0]
    found = cause(tmp_path)
    assert (found.kind, found.rank) == ("lost_rank", 1)


def test_an_earlier_start_of_the_same_name_is_not_believed(tmp_path: Path) -> None:
    """Its files are old; a start that believed them would end at once."""
    board = Board(tmp_path, 0, 2, {"MASTER_PORT": "1"})
    board.folder.mkdir(parents=True)
    old = board.folder / "root_cause.json"
    old.write_text(json.dumps({"kind": "hang"}))
    assert board.decided()
    os.utime(old, (1.0, 1.0))
    assert not board.decided()


def test_a_phase_inside_a_phase(tmp_path: Path) -> None:
    watch = Watch(Board(tmp_path, 0, 1, {}), {})
    watch.enter("step", 3, "main")
    before = watch._place
    with watch.during("save"):
        assert (watch._place.phase, watch._place.step) == ("save", 3)
    assert watch._place.phase == "step"
    assert watch._place.since > before.since, "the time of a save is not the step's"


@pytest.mark.parametrize("kind", ["exception", "hang"])
def test_one_rank_alone_decides(kind: str, tmp_path: Path) -> None:
    board = Board(tmp_path, 0, 1, {})
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
