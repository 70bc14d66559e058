"""``nemotron3 status RUN`` and ``nemotron3 stop RUN``."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.launch import slurm
from nemotron3_megatron.launch.chain import STOP
from nemotron3_megatron.launch.job import FILE_NAME, job_name
from nemotron3_megatron.launch.progress import newest_checkpoint
from nemotron3_megatron.launch.segments import Segment, read_segments
from nemotron3_megatron.launch.submission import Submission, read_submission, write_file
from nemotron3_megatron.telemetry.jsonlines import METRICS, read_steps
from nemotron3_megatron.telemetry.records import StepRecord
from nemotron3_megatron.telemetry.throughput import format_count, format_duration

_RECENT_STEPS = 50
"""Whose median time stands for the steps to come."""
_SHOWN_SEGMENTS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How a run fares; times in seconds."""

    name: str
    run_dir: str
    step: int
    total_steps: int
    tokens: int
    stage: str
    loss: float | None
    newest_checkpoint: int
    eta_s: float | None
    """Until the last step, at the recent step time and the goodput so far, without waiting in the queue."""
    goodput: float | None
    """Time of the steps that count, over the time that segments held their nodes; repeated steps count once."""
    segments: int
    last_error: str
    jobs: tuple[str, ...]


def status_main(arguments: list[str], as_json: bool) -> int:
    """Print the status of a submitted run."""
    run_dir = _directory(arguments, "status")
    submission, segments = read_submission(run_dir), read_segments(run_dir)
    steps = read_steps(run_dir) if (run_dir / METRICS).exists() else []
    jobs = slurm.jobs(job_name(submission.name, run_dir))
    status = status_of(submission, segments, steps, jobs, time.time())
    if as_json:
        sys.stdout.write(json.dumps(asdict(status), indent=2) + "\n")
    else:
        sys.stdout.write("\n".join([*_lines(status), *_segment_lines(segments)]) + "\n")
    return 0


def status_of(
    submission: Submission,
    segments: Sequence[Segment],
    steps: Sequence[StepRecord],
    jobs: Sequence[slurm.Job],
    now: float,
) -> Status:
    """Progress and goodput from the records; pure, but for the newest checkpoint on disk."""
    last = steps[-1] if steps else None
    left = submission.total_steps - (last.step if last else 0)
    held = _held_seconds(segments, jobs, now)
    useful = sum(record.step_time_s for record in steps)
    goodput = min(useful / held, 1.0) if held and useful else None
    recent = [record.step_time_s for record in steps[-_RECENT_STEPS:]]
    errors = [segment.outcome.error for segment in segments if segment.outcome is not None and segment.outcome.error]
    return Status(
        name=submission.name,
        run_dir=str(submission.run_dir),
        step=last.step if last else 0,
        total_steps=submission.total_steps,
        tokens=last.tokens if last else 0,
        stage=last.stage if last else submission.worlds[0].stage,
        loss=last.loss if last else None,
        newest_checkpoint=newest_checkpoint(submission.run_dir),
        eta_s=left * statistics.median(recent) / goodput if recent and goodput else None,
        goodput=goodput,
        segments=len(segments),
        last_error=errors[-1] if errors else "",
        jobs=tuple(f"{job.number} {job.state}" + (f" ({job.reason})" if job.reason != "None" else "") for job in jobs),
    )


def stop_main(arguments: list[str]) -> int:
    """Take waiting segments out of the queue and tell the running one to save and leave."""
    run_dir = _directory(arguments, "stop")
    submission = read_submission(run_dir)
    jobs = slurm.jobs(job_name(submission.name, run_dir))
    if not jobs:
        why = "no job of this run is in the queue"
        raise UserError(f"stop {run_dir}", why=why, nearest=f"nemotron3 status {run_dir}")
    write_file(run_dir / STOP, "\n".join(job.number for job in jobs) + "\n")
    slurm.cancel([job.number for job in jobs if job.state == "PENDING"])
    running = [job.number for job in jobs if job.state == "RUNNING"]
    for number in running:
        slurm.warn(number)
    told = f"job {', '.join(running)} saves and leaves" if running else "nothing ran; waiting jobs are cancelled"
    sys.stdout.write(f"{told}; sbatch {run_dir / FILE_NAME} continues the run\n")
    return 0


def _directory(arguments: Sequence[str], verb: str) -> Path:
    if len(arguments) != 1:
        given = " ".join([verb, *arguments])
        raise UserError(given, where="command line", why="takes one run directory", nearest=f"nemotron3 {verb} RUN")
    return Path(arguments[0].removeprefix("run_dir=")).absolute()


def _held_seconds(segments: Sequence[Segment], jobs: Sequence[slurm.Job], now: float) -> float:
    """A segment that was lost without a word held its nodes at most until the next one began."""
    running = {job.number for job in jobs if job.state == "RUNNING"}
    held = 0.0
    for index, segment in enumerate(segments):
        end = segment.end_time
        if end is None:
            later = segments[index + 1].begin_time if index + 1 < len(segments) else None
            alive = segment.name.partition(".")[0] in running
            end = later if later is not None else now if alive else segment.begin_time
        held += max(end - segment.begin_time, 0.0)
    return held


def _lines(status: Status) -> Iterator[str]:
    share = status.step / status.total_steps
    yield f"{status.name}: step {status.step:,} of {status.total_steps:,} ({share:.1%}), stage {status.stage}"
    loss = "" if status.loss is None else f", loss {status.loss:.4f}"
    yield f"  {format_count(status.tokens)} tokens{loss}, newest checkpoint: step {status.newest_checkpoint:,}"
    eta = "unknown" if status.eta_s is None else format_duration(status.eta_s)
    goodput = "unknown" if status.goodput is None else f"{status.goodput:.1%}"
    yield f"  time left: {eta}; goodput: {goodput} of the time on nodes; segments: {status.segments}"
    yield f"  jobs: {', '.join(status.jobs) or 'none in the queue'}"
    if status.last_error:
        yield f"  last error: {status.last_error}"


def _segment_lines(segments: Sequence[Segment]) -> Iterator[str]:
    for segment in segments[-_SHOWN_SEGMENTS:]:
        began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(segment.begin_time))
        if segment.outcome is None or segment.end_time is None:
            ending = "running, or ended from outside"
        else:
            took = format_duration(segment.end_time - segment.begin_time)
            ending = f"step {segment.end_step:,} after {took}, code {segment.outcome.code}; {segment.verdict}"
        start = f"{began}, {segment.nodes} nodes, from step {segment.begin_checkpoint:,}"
        yield f"  segment {segment.name}: {start}; {ending}"
