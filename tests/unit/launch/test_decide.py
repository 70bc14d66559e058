"""What follows a segment: every kind of ending, and histories that must end the chain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nemotron3_megatron.config.cluster import ClusterConfig
from nemotron3_megatron.config.duration import Duration
from nemotron3_megatron.launch.decide import LONGEST_WAIT_S, NO_PROGRESS, Ending, decide
from nemotron3_megatron.launch.outcome import Outcome
from nemotron3_megatron.launch.segments import Segment

CLUSTER = ClusterConfig(retries=2, retry_wait=Duration(60, "seconds"), restarts_in_job=0)
CRASH = Outcome(1, "RuntimeError: broken", 3, "n1")


def ending(outcome: Outcome, *, begin: int = 10, checkpoint: int = 10, step: int = 14) -> Ending:
    return Ending(outcome, begin, checkpoint, step, "7")


def segment(
    outcome: Outcome | None, *, begin: int = 10, checkpoint: int = 10, step: int = 12, name: str = "1.0"
) -> Segment:
    return Segment(
        name=name,
        nodes=1,
        begin_time=0,
        begin_checkpoint=begin,
        end_time=None if outcome is None else 1.0,
        end_checkpoint=checkpoint,
        end_step=step,
        outcome=outcome,
    )


@pytest.mark.parametrize(
    ("outcome", "checkpoint", "line"),
    [
        (Outcome(0), 10, "done"),
        (Outcome(75), 14, "again 0"),
        (Outcome(2, "UserError: no such key"), 10, "failed"),
        (CRASH, 10, "again 60"),
        (Outcome(-9, "killed by SIGKILL"), 10, "again 60"),
        (Outcome(75), 10, "again 60"),
    ],
)
def test_a_first_segment(outcome: Outcome, checkpoint: int, line: str) -> None:
    assert str(decide(ending(outcome, checkpoint=checkpoint), [], CLUSTER, stop_wanted=False)) == line


def test_a_wish_to_stop_ends_the_chain_unless_there_is_nothing_to_stop() -> None:
    assert decide(ending(Outcome(75), checkpoint=14), [], CLUSTER, stop_wanted=True).word == "stopped"
    assert decide(ending(CRASH), [], CLUSTER, stop_wanted=True).word == "stopped"
    assert decide(ending(Outcome(0)), [], CLUSTER, stop_wanted=True).word == "done"


def test_the_same_error_at_the_same_step_ends_the_chain_and_says_so() -> None:
    again = Outcome(1, "RuntimeError: broken", 5, "n7")
    verdict = decide(ending(again, step=14), [segment(CRASH, begin=0, step=14)], CLUSTER, stop_wanted=False)
    assert verdict.word == "failed"
    assert "same error at the same step (14) as in segment 1.0: RuntimeError: broken" in verdict.reason


@pytest.mark.parametrize(
    "before",
    [
        segment(CRASH, step=13),
        segment(Outcome(1, "ValueError: another"), step=14),
        segment(Outcome(75), begin=0, checkpoint=10, step=14),
        segment(CRASH, begin=0, checkpoint=5, step=14),
        segment(None),
    ],
    ids=["another step", "another error", "progress", "an older failure", "lost"],
)
def test_what_is_not_the_same_failure_is_tried_again(before: Segment) -> None:
    assert decide(ending(CRASH, step=14), [before], CLUSTER, stop_wanted=False).word == "again"


def test_a_failure_after_new_checkpoints_counts_from_one() -> None:
    history = [segment(Outcome(1, f"E{number}: x"), step=number) for number in range(10, 12)]
    assert decide(ending(CRASH), history, CLUSTER, stop_wanted=False).word == "failed"
    assert str(decide(ending(CRASH, checkpoint=12), history, CLUSTER, stop_wanted=False)) == "again 60"


def test_retries_back_off_and_end() -> None:
    patient = replace(CLUSTER, retries=9)
    history = [segment(Outcome(1, f"E{'x' * number}"), step=number) for number in range(8)]
    waits = [decide(ending(CRASH), history[:n], patient, stop_wanted=False).wait_s for n in range(8)]
    assert waits == [60, 120, 240, 480, 960, LONGEST_WAIT_S, LONGEST_WAIT_S, LONGEST_WAIT_S]
    verdict = decide(ending(CRASH), history[:2], CLUSTER, stop_wanted=False)
    assert verdict.word == "failed"
    assert "3 failed segments in a row" in verdict.reason


def test_a_failure_is_tried_again_in_the_same_job_so_many_times_in_a_row() -> None:
    """Segments of other jobs do not count; who was told to leave has no time left here."""
    near = replace(CLUSTER, retries=9, restarts_in_job=2)
    here, other = segment(Outcome(1, "A: x"), name="7.0"), segment(Outcome(1, "B: x"), name="6.0")
    again = segment(Outcome(1, "C: x"), name="7.0-1")

    def line(*before: Segment, outcome: Outcome = CRASH, checkpoint: int = 10) -> str:
        return str(decide(ending(outcome, checkpoint=checkpoint), before, near, stop_wanted=False))

    assert line() == "here 60"
    assert line(other, here) == "here 240"
    assert line(other, here, again) == "again 480"
    assert line(other, here, again, checkpoint=12) == "here 60", "there was progress"
    assert line(outcome=Outcome(75)) == "again 60"
    assert line(outcome=Outcome(75), checkpoint=12) == "again 0"


def test_leaving_without_a_new_checkpoint_cannot_go_on_for_ever() -> None:
    stuck = [segment(Outcome(75)), segment(Outcome(75))]
    verdict = decide(ending(Outcome(75)), stuck, CLUSTER, stop_wanted=False)
    assert verdict.word == "failed"
    assert NO_PROGRESS in verdict.reason


def test_a_lost_segment_neither_counts_nor_hides_a_failure() -> None:
    history = [segment(Outcome(1, "A: x")), segment(None), segment(Outcome(1, "B: x")), segment(None)]
    assert decide(ending(CRASH), history, CLUSTER, stop_wanted=False).word == "failed"
