"""What follows a segment: a pure function of how this one and those before it ended."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from nemotron3_megatron.config.cluster import ClusterConfig
from nemotron3_megatron.launch.outcome import DONE, START_AGAIN, USER_ERROR, Outcome
from nemotron3_megatron.launch.segments import Segment

LONGEST_WAIT_S = 1800
"""Upper end of the back-off, as ``cluster.retry_wait`` says."""
NO_PROGRESS = "no checkpoint was saved"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the batch script is to do."""

    word: Literal["again", "done", "stopped", "failed"]
    """again: submit the next segment; done: the target is reached; stopped: on request; failed: it makes no sense."""
    reason: str
    wait_s: int = 0
    here: bool = False
    """Of again: in this very job, if its time suffices."""

    def __str__(self) -> str:
        """The one line that the batch script reads."""
        if self.word != "again":
            return self.word
        return f"{'here' if self.here else 'again'} {self.wait_s}"


@dataclass(frozen=True, slots=True)
class Ending:
    """A segment that has just ended."""

    outcome: Outcome
    begin_checkpoint: int
    checkpoint: int
    """Newest one now."""
    step: int
    """Last recorded."""
    job: str
    """Number of its Slurm job."""

    @property
    def problem(self) -> Outcome | None:
        """Its failure; leaving without a newer checkpoint is one too, or a chain could run on for ever."""
        if self.outcome.failed:
            return self.outcome
        stuck = self.outcome.code == START_AGAIN and self.checkpoint <= self.begin_checkpoint
        return Outcome(START_AGAIN, NO_PROGRESS) if stuck else None


def decide(now: Ending, before: Sequence[Segment], cluster: ClusterConfig, *, stop_wanted: bool) -> Verdict:
    """Decide.

    Args:
        now: how the segment ended.
        before: the earlier segments, oldest first.
        cluster: its limits.
        stop_wanted: ``nemotron3 stop`` was called.
    """
    if now.outcome.code == DONE:
        return Verdict("done", "the target is reached")
    if now.outcome.code == USER_ERROR:
        return Verdict("failed", f"the input is wrong: {now.outcome.error}")
    if stop_wanted:
        return Verdict("stopped", "on request")
    problem = now.problem
    if problem is None:
        return Verdict("again", "saved, and wants to go on")
    earlier = _failures_in_a_row(now, before)
    twin = next((segment for segment in earlier if _same(now, problem, segment)), None)
    if twin is not None:
        why = f"the same error at the same step ({now.step}) as in segment {twin.name}: {problem.error}"
        return Verdict("failed", why)
    if len(earlier) >= cluster.retries:
        return Verdict("failed", f"{len(earlier) + 1} failed segments in a row; the last: {problem.error}")
    wait_s = min(round(cluster.retry_wait.value) * 2 ** len(earlier), LONGEST_WAIT_S)
    # Who leaves with 75 was told to: the job's time is over.
    here = now.outcome.failed and sum(each.job == now.job for each in earlier) < cluster.restarts_in_job
    which = f"retry {len(earlier) + 1} of {cluster.retries}{', in the same job,' if here else ''}"
    return Verdict("again", f"{which} after: {problem.error}", wait_s, here)


def _failures_in_a_row(now: Ending, before: Sequence[Segment]) -> list[Segment]:
    """The failed segments directly before, newest first, back to the last one after which there was progress."""
    found: list[Segment] = []
    for segment in reversed(before):
        if segment.outcome is None:
            continue  # ended from outside: neither a failure of the run nor progress
        stuck = _problem(segment) is not None
        if not stuck or segment.end_checkpoint < now.begin_checkpoint or now.checkpoint > now.begin_checkpoint:
            break
        found.append(segment)
    return found


def _problem(segment: Segment) -> Outcome | None:
    if segment.outcome is None:
        return None
    begun_at, checkpoint = segment.begin_checkpoint, segment.end_checkpoint
    return Ending(segment.outcome, begun_at, checkpoint, segment.end_step, segment.job).problem


def _same(now: Ending, problem: Outcome, segment: Segment) -> bool:
    earlier = _problem(segment)
    if earlier is None or segment.end_step != now.step:
        return False
    return problem.same_error(earlier)
