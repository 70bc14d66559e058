"""Which record is the root cause, and what is said about it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron3_megatron.resilience.failure import Failure, attempt_name, kind_of, ranks_text, root_cause

STACK = '  File "/x/loop.py", line 5, in run_steps\n    step()\n  File "/x/deep/{}", line {}, in {}\n    wait()\n'
MINE = Failure(
    kind="exception",
    rank=1,
    host="node7",
    step=20,
    stage="main",
    phase="step",
    error="ValueError: no",
    stack=STACK.format("faults.py", 9, "happen"),
    time_s=100.0,
    world_size=4,
)


def hang(rank: int, step: int, *, waiting: bool, place: str) -> Failure:
    return replace(
        MINE, kind="hang", rank=rank, step=step, waiting=waiting, error="late", stack=STACK.format(place, 7, "f")
    )


def test_an_exception_is_its_own_cause() -> None:
    assert root_cause(MINE, [MINE]) == MINE
    text = MINE.text()
    for part in ("rank 1 of 4", "node7", "step 20", "stage main", "ValueError: no", "faults.py"):
        assert text.count(part) == 1, part


def test_whoever_lost_a_peer_names_the_silent_rank() -> None:
    lost = replace(MINE, kind="lost_peer", rank=0, error="RuntimeError: Connection closed by peer")
    found = root_cause(lost, [lost, replace(lost, rank=1), replace(lost, rank=3)])
    assert (found.kind, found.rank, found.step) == ("lost_rank", 2, 20)
    assert "rank 2 did not" in found.others
    assert "Connection closed" in found.error


def test_an_exception_beats_a_lost_connection() -> None:
    lost = replace(MINE, kind="lost_peer", rank=0, time_s=99.0)
    assert root_cause(lost, [lost, MINE]) == MINE


def test_of_a_hang_the_rank_that_does_not_wait_is_the_cause() -> None:
    records = [hang(rank, 20, waiting=rank != 2, place="c10d.py" if rank != 2 else "reader.py") for rank in range(4)]
    found = root_cause(records[0], records)
    assert found.rank == 2
    assert found.others == "ranks 0-1, 3: step 20, step: f (c10d.py:7); rank 2: step 20, step: f (reader.py:7)"


def test_of_a_hang_the_rank_that_holds_pythons_lock_is_the_cause() -> None:
    """Whoever waits in a collective has given it up; that it was late in answering says nothing."""
    records = [replace(hang(rank, 20, waiting=rank == 3, place="x.py"), time_s=float(rank)) for rank in range(4)]
    records[2] = replace(records[2], mute=True)
    assert root_cause(records[0], records).rank == 2


def test_of_a_hang_the_rank_behind_is_the_cause() -> None:
    records = [hang(0, 21, waiting=False, place="x.py"), hang(3, 20, waiting=True, place="y.py")]
    found = root_cause(records[0], records)
    assert found.rank == 3
    assert "no answer from ranks 1-2" in found.others


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (RuntimeError("[pair.cc:538] Read error [127.0.0.1]:58051: Connection reset by peer"), "lost_peer"),
        (RuntimeError("CUDA error: an illegal memory access"), "exception"),
        (ValueError("connection closed by peer"), "exception"),
        (ConnectionResetError("Connection reset by peer"), "exception"),
    ],
)
def test_echoes_are_told_from_reasons(error: Exception, kind: str) -> None:
    """The last one is a data loader's or a tracker's, not a collective's."""
    assert kind_of(error) == kind


def test_json_round_trip() -> None:
    assert Failure.from_json(MINE.to_json()) == MINE
    with pytest.raises(ValueError, match="not the record"):
        Failure.from_json("{}")


def test_starts_have_names_of_their_own() -> None:
    first = {"SLURM_JOB_ID": "7", "MASTER_PORT": "29500", "TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4"}
    one_node = first | {"TORCHELASTIC_RESTART_COUNT": "0", "LOCAL_WORLD_SIZE": "4"}
    names = [
        attempt_name(first, 5, 4),
        attempt_name(first | {"SLURM_RESTART_COUNT": "1"}, 5, 4),
        attempt_name(first | {"TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "../a b"}, 5, 4),
        # The same command once more: another torchrun, the same port.
        attempt_name(one_node, 5, 4),
        attempt_name(one_node, 15, 14),
        attempt_name({}, 5, 4),
        attempt_name({}, 15, 4),
    ]
    assert len(set(names)) == 7
    assert all("/" not in name and " " not in name for name in names)


@pytest.mark.parametrize("local", ["4", "2"])
def test_all_ranks_of_a_start_have_one_name_for_it(local: str) -> None:
    """On two nodes torchrun's processes differ, so that its number is no part of the name."""
    start = {"MASTER_PORT": "29500", "TORCHELASTIC_RESTART_COUNT": "0", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": local}
    other_parent = 4 if local == "4" else 14
    assert attempt_name(start | {"RANK": "0"}, 5, 4) == attempt_name(start | {"RANK": "3"}, 6, other_parent)


@pytest.mark.parametrize(("ranks", "text"), [([3], "rank 3"), ([0, 1, 2, 7], "ranks 0-2, 7"), ([5, 4], "ranks 4-5")])
def test_ranks_text(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text
