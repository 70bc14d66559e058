"""The first failure of a segment, from records as ranks and nodes leave them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nemotron3_megatron.launch.exit_record import RECORDS_LIMIT, leave_record, without_secrets
from nemotron3_megatron.launch.outcome import Outcome, RankEnd, exits_directory, read_outcome, write_node

SEGMENT = "7.0"


@pytest.fixture
def exits(tmp_path: Path) -> Path:
    directory = exits_directory(tmp_path, SEGMENT)
    directory.mkdir(parents=True)
    return directory


def told(directory: Path, rank: int, time: float, message: str, code: int = 1) -> None:
    record = {"rank": rank, "code": code, "host": f"n{rank}", "time": time, "kind": "RuntimeError", "message": message}
    (directory / f"rank_{rank:05d}.json").write_text(json.dumps(record))


def test_without_records_srun_is_believed(tmp_path: Path) -> None:
    assert read_outcome(tmp_path, SEGMENT, 0) == Outcome(0)
    assert read_outcome(tmp_path, SEGMENT, 137) == Outcome(137, "srun ended with 137; no rank left a record")


def test_the_first_exception_is_the_cause(tmp_path: Path, exits: Path) -> None:
    told(exits, 0, 100.2, "Connection closed by peer")
    told(exits, 5, 100.1, "CUDA error\nmore lines")
    write_node(exits, 0, [RankEnd(0, 1, 100.0), RankEnd(1, -15, 100.0), RankEnd(5, 1, 100.0)])
    assert read_outcome(tmp_path, SEGMENT, 1) == Outcome(1, "RuntimeError: CUDA error", 5, "n5")


def test_a_silent_death_comes_before_what_its_peers_say(tmp_path: Path, exits: Path) -> None:
    """torchrun notices it later than the peers notice the closed connection."""
    told(exits, 0, 100.3, "Connection closed by peer")
    write_node(exits, 1, [RankEnd(3, -9, 101.0)])
    outcome = read_outcome(tmp_path, SEGMENT, 1)
    assert (outcome.code, outcome.rank) == (-9, 3)
    assert "SIGKILL" in outcome.error


def test_one_rank_that_saved_speaks_for_all(tmp_path: Path, exits: Path) -> None:
    """torchrun ends the ranks that are still leaving."""
    write_node(exits, 0, [RankEnd(0, -15, 99.0), RankEnd(1, 75, 100.0)])
    assert read_outcome(tmp_path, SEGMENT, 1) == Outcome(75)


def test_a_root_cause_that_the_ranks_agreed_on_stands(tmp_path: Path, exits: Path) -> None:
    told(exits, 0, 100.0, "Connection closed by peer")
    for attempt, error in {
        "7_0_x_0": "ValueError: mine",
        "7_1_x_0": "of the next start",
        "77_0": "another job",
    }.items():
        folder = tmp_path / "failures" / attempt
        folder.mkdir(parents=True)
        (folder / "root_cause.json").write_text(json.dumps({"error": error, "rank": 4, "host": "n4", "step": 9}))
    assert read_outcome(tmp_path, SEGMENT, 1) == Outcome(1, "ValueError: mine", 4, "n4")


def test_how_a_silent_rank_died_is_its_nodes_to_say(tmp_path: Path, exits: Path) -> None:
    """The ranks that are left can only agree that it is gone."""
    folder = tmp_path / "failures" / "7_0_x"
    folder.mkdir(parents=True)
    record = {"kind": "lost_rank", "error": "ended without a word", "rank": 3, "host": "an unknown host"}
    (folder / "root_cause.json").write_text(json.dumps(record))
    told(exits, 0, 100.0, "Connection closed by peer")
    assert read_outcome(tmp_path, SEGMENT, 1) == Outcome(1, "ended without a word", 3, "an unknown host")
    write_node(exits, 1, [RankEnd(2, -15, 101.0), RankEnd(3, -11, 101.0)])
    outcome = read_outcome(tmp_path, SEGMENT, 1)
    assert (outcome.code, outcome.rank, outcome.error) == (-11, 3, "killed by SIGSEGV")
    assert outcome.host != "an unknown host"


def test_torn_records_say_nothing(tmp_path: Path, exits: Path) -> None:
    (exits / "rank_00000.json").write_text('{"rank": 0, "ti')
    (exits / "node_00000.json").write_text("[1]")
    assert read_outcome(tmp_path, SEGMENT, 3).code == 3


def test_addresses_and_times_do_not_make_another_error() -> None:
    one = Outcome(1, "RuntimeError: [10.0.0.7]:4321 at 0x7f3a after 12.5 s")
    assert one.same_error(Outcome(1, "RuntimeError: [10.0.0.8]:99 at 0x7aaa after 3.25 s"))
    assert not one.same_error(Outcome(1, "ValueError: [10.0.0.7]:4321 at 0x7f3a after 12.5 s"))
    assert not Outcome(0).same_error(Outcome(0))


def test_a_rank_leaves_its_exception_and_python_still_reports_it(tmp_path: Path) -> None:
    program = (
        "import sys\nfrom nemotron3_megatron.launch.exit_record import recorded\n"
        "def main(arguments):\n    raise RuntimeError(f'bad {arguments[0]} hf_0123456789')\n"
        "recorded(main, sys.argv[1:])\n"
    )
    variables = {"NEMOTRON3_EXITS": str(tmp_path), "RANK": "12", "HF_TOKEN": "hf_0123456789"}
    path = {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", program, "news"], env=variables | path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "RuntimeError: bad news" in done.stderr
    record = json.loads((tmp_path / "rank_00012.json").read_text())
    assert (record["rank"], record["kind"], record["message"]) == (12, "RuntimeError", "bad news <HF_TOKEN>")
    assert record["stack"][-1].endswith(" main")


def test_records_are_bounded_and_nothing_is_written_without_the_launcher(tmp_path: Path) -> None:
    for rank in range(RECORDS_LIMIT + 5):
        leave_record(1, ValueError("x"), {"NEMOTRON3_EXITS": str(tmp_path), "RANK": str(rank)})
    assert len(list(tmp_path.iterdir())) == RECORDS_LIMIT
    leave_record(1, ValueError("x"), {})
    leave_record(1, ValueError("x"), {"NEMOTRON3_EXITS": str(tmp_path / "missing")})


def test_secrets_are_found_by_their_names() -> None:
    environment = {"WANDB_API_KEY": "abcdef123", "MY_TOKEN": "tok-456789", "HOME": "/home/me", "X_SECRET": "no"}
    text = without_secrets("abcdef123 tok-456789 /home/me no", environment)
    assert text == "<WANDB_API_KEY> <MY_TOKEN> /home/me no", "short values are words, not secrets"
