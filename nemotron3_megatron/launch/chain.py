"""``nemotron3 launch next RUN code=N``: the batch script's question when a segment has ended."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import replace
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.launch import segments
from nemotron3_megatron.launch.decide import Ending, Verdict, decide
from nemotron3_megatron.launch.job import FILE_NAME, render
from nemotron3_megatron.launch.outcome import read_outcome
from nemotron3_megatron.launch.progress import newest_checkpoint, recorded_step
from nemotron3_megatron.launch.submission import read_submission, write_file

STOP = "stop_requested"
"""Holds the numbers of the jobs that ``nemotron3 stop`` ended; a job submitted later is not meant."""

_log = logging.getLogger(__name__)


def launch_main(arguments: list[str]) -> int:
    """Record the segment's end, make the next segment's script, and print the verdict as one line."""
    if len(arguments) != 3 or arguments[0] != "next" or not arguments[2].removeprefix("code=").isdigit():
        given, why = " ".join(["launch", *arguments]), "asks for no run and status"
        raise UserError(given, where="command line", why=why, nearest="launch next RUN code=NUMBER")
    segment = os.environ.get("NEMOTRON3_SEGMENT", "")
    if not segment:
        raise UserError("launch next", why="is the batch script's, inside a job", nearest="sbatch RUN/job.sbatch")
    verdict = next_segment(Path(arguments[1]), segment, int(arguments[2].removeprefix("code=")))
    _log.info("%s: %s", verdict.word, verdict.reason)
    sys.stdout.write(f"{verdict}\n")
    return 0


def next_segment(run_dir: Path, segment: str, code: int) -> Verdict:
    """What follows ``segment``, which ended with ``code``; ``job.sbatch`` then suits the stage in force."""
    submission = read_submission(run_dir)
    known = segments.read_segments(run_dir)
    this = next((found for found in known if found.name == segment), None)
    checkpoint = newest_checkpoint(run_dir)
    outcome = read_outcome(run_dir, segment, code)
    begun_at, job = this.begin_checkpoint if this else checkpoint, segment.partition(".")[0]
    now = Ending(outcome, begun_at, checkpoint, recorded_step(run_dir), job)
    before = [found for found in known if found.name != segment]
    verdict = decide(now, before, submission.cluster, stop_wanted=stop_wanted(run_dir, segment))
    if submission.world_at(begun_at) != submission.world_at(checkpoint):
        verdict = replace(verdict, here=False)  # it failed in a stage that this job has not the nodes for
    segments.end(run_dir, segment, outcome, f"{verdict.word}: {verdict.reason}")
    write_file(run_dir / FILE_NAME, render(submission, submission.world_at(checkpoint)))
    return verdict


def stop_wanted(run_dir: Path, segment: str) -> bool:
    """Whether ``nemotron3 stop`` meant this segment's job."""
    path = run_dir / STOP
    return path.exists() and segment.partition(".")[0] in path.read_text(encoding="utf-8").split()
