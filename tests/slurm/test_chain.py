"""One run through everything that ends a segment, on a real Slurm; its losses are those of a run left alone.

Two nodes with one rank each, gloo. Every test looks at another part of the same run.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from e2e_start import records
from lab import Lab
from submitted import SECRET, STEPS, Submitted, nemotron3, pick, read

pytestmark = [pytest.mark.timeout(3000), pytest.mark.slow]
BITWISE = ("step", "tokens", "stage", "loss", "mtp_losses", "grad_norm", "lr", "skipped")
HOSTILE = "a b$(touch pwned);'x' %j &"
"""Reaches sbatch, two shells, srun, Hydra and PYTHONPATH."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a segment was disturbed, and what Slurm says of its job afterwards."""

    job: str
    state: dict[str, str]


@pytest.fixture(scope="module")
def undisturbed(lab: Lab, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    run = Submitted.start(lab, tmp_path_factory.mktemp("undisturbed") / HOSTILE, data)
    state = lab.wait_for(run.first_job, "COMPLETED", "FAILED", timeout_s=600)
    assert state["JobState"] == "COMPLETED", run.logs()
    return run


@pytest.fixture(scope="module")
def disturbed(lab: Lab, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Submitted, dict[str, Ended]]:
    run = Submitted.start(lab, tmp_path_factory.mktemp("disturbed") / "run", data)
    ends: dict[str, Ended] = {}
    job = run.first_job

    run.when_trained(job, 4)
    lab.call("scancel", "--batch", "--signal=USR1", job)  # what --signal does before the time limit
    ends["warned"] = Ended(job, {})
    job = run.next_job(job)

    run.when_trained(job, 4)
    run.rank(1).send_signal(signal.SIGKILL)
    run.when(lambda: len(run.begun(job)()) == 2, "a restart on the same nodes")
    ends["killed"] = Ended(job, lab.job(job))

    run.when_trained(job, 3)
    with lab.without_controller():
        before = run.step()
        run.when(lambda: run.step() > before, "a step without a controller")
    lab.crash("n2")
    lab.wait_until(lambda: lab.job(job)["Restarts"] == "1", 300, "requeue after the node's death")
    lab.start_node("n2")
    run.when(lambda: len(run.begun(job)()) == 3, "a third beginning of the same job")
    run.when_trained(job, 3)
    lab.call("scancel", job)
    ends["node lost, then cancelled"] = Ended(job, lab.wait_for(job, "CANCELLED", timeout_s=300))
    assert lab.jobs()[-1] == job, "a cancelled chain stays ended"

    job = lab.call("sbatch", "--parsable", run.run_dir / "job.sbatch")
    run.when_trained(job, 3)
    assert nemotron3(lab, "stop", run.run_dir)[0] == 0
    ends["stopped"] = Ended(job, lab.wait_for(job, "COMPLETED", "FAILED", timeout_s=300))
    assert lab.jobs()[-1] == job, "a stopped chain stays ended"

    job = lab.call("sbatch", "--parsable", run.run_dir / "job.sbatch")
    run.when_trained(job, 3)
    urgent = lab.call(
        "sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true", "-o/dev/null"
    )
    ends["preempted"] = Ended(job, lab.wait_for(job, "COMPLETED", "FAILED", timeout_s=300))
    job = next(number for number in lab.jobs() if int(number) > int(urgent)) if run.next_job(urgent) else ""
    ends["finished"] = Ended(job, lab.wait_for(job, "COMPLETED", "FAILED", timeout_s=400))
    return run, ends


def by_job(run: Submitted, job: str) -> list[dict[str, Any]]:
    return [event for event in run.events() if event["segment"].partition(".")[0] == job and event["event"] == "end"]


def test_a_run_left_alone_is_one_segment(undisturbed: Submitted) -> None:
    begin, end = undisturbed.events()
    assert (begin["event"], end["event"], end["code"]) == ("begin", "end", 0)
    assert end["verdict"].startswith("done")
    assert len(records(undisturbed.run_dir)) == STEPS


def test_losses_after_every_recovery_are_those_of_the_run_left_alone(
    undisturbed: Submitted, disturbed: tuple[Submitted, dict[str, Ended]]
) -> None:
    run, ends = disturbed
    assert ends["finished"].state["JobState"] == "COMPLETED", run.logs()
    found, wanted = (pick(records(each.run_dir), BITWISE) for each in (run, undisturbed))
    assert found == wanted
    assert len({record["loss"] for record in wanted}) == STEPS, "and a wrong step would show"


def test_each_ending_was_what_it_should_be(disturbed: tuple[Submitted, dict[str, Ended]]) -> None:
    run, ends = disturbed
    verdicts = {name: [event["verdict"] for event in by_job(run, end.job)] for name, end in ends.items()}
    codes = {name: [event["code"] for event in by_job(run, end.job)] for name, end in ends.items()}
    assert codes["warned"] == codes["stopped"] == codes["preempted"] == [75]
    assert verdicts["warned"] == verdicts["preempted"] == ["again: saved, and wants to go on"]
    assert verdicts["stopped"] == ["stopped: on request"]
    assert codes["finished"] == [0]
    assert len(codes["killed"]) == 1
    assert codes["node lost, then cancelled"] == codes["killed"], "Slurm ended both, and nothing was to be decided"
    assert ends["stopped"].state["JobState"] == ends["preempted"].state["JobState"] == "COMPLETED"


def test_a_killed_rank_is_named_though_torchrun_says_1(disturbed: tuple[Submitted, dict[str, Ended]]) -> None:
    run, ends = disturbed
    (end,) = by_job(run, ends["killed"].job)
    assert end["verdict"].startswith("again: retry 1 of 3, in the same job, after: ")
    assert (end["rank"], end["host"]) == (1, "n2") or "rank 1" in end["error"], end
    assert ends["killed"].state["JobState"] == "RUNNING"
    assert ends["killed"].job == ends["node lost, then cancelled"].job
    begun = [event["segment"] for event in run.events() if event["event"] == "begin"]
    job = ends["killed"].job
    assert [name for name in begun if name.startswith(f"{job}.")] == [f"{job}.0", f"{job}.0-1", f"{job}.1"]


def test_status_tells_the_run(lab: Lab, disturbed: tuple[Submitted, dict[str, Ended]]) -> None:
    run, _ = disturbed
    code, out, err = nemotron3(lab, "status", run.run_dir)
    assert code == 0, err
    assert f"step {STEPS} of {STEPS} (100.0%)" in out
    assert "segments: 7" in out, out


def test_nothing_of_a_hostile_name_was_executed(undisturbed: Submitted) -> None:
    assert undisturbed.run_dir.name == HOSTILE
    places = [Path.cwd(), undisturbed.run_dir, undisturbed.run_dir.parent, undisturbed.run_dir / "code"]
    assert not [place for place in places if (place / "pwned").exists()]
    assert (undisturbed.run_dir / "logs" / f"segment_{undisturbed.first_job}.log").is_file()


def test_no_secret_is_in_any_file_of_the_run(disturbed: tuple[Submitted, dict[str, Ended]]) -> None:
    run, _ = disturbed
    for path in run.run_dir.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not [name for name, value in SECRET.items() if value.encode() in content], path


def test_files_are_safe_and_complete(undisturbed: Submitted) -> None:
    """Others can neither read nor write; the restart needs nothing outside."""
    run_dir = undisturbed.run_dir
    for name in ("job.sbatch", "launch.json", "recipe.json", "environment.json", "segments.jsonl"):
        assert os.stat(run_dir / name).st_mode & 0o137 == 0, name
    assert os.stat(run_dir).st_mode & 0o027 == 0
    assert (run_dir / "code" / "train.py").is_file()
    assert "<html" in (run_dir / "plan.html").read_text()[:200]
    assert read(run_dir / "environment.json")["packages"]["torch"].startswith("2.")


def test_slurm_warns_by_itself_before_the_time_limit(
    lab: Lab, data: Path, undisturbed: Submitted, tmp_path: Path
) -> None:
    """Nobody sends a signal here but Slurm's clock; the run is too long for one segment of three minutes."""
    endless = ("max_steps=null", "stages.main.tokens=5000 steps", "checkpoint.every=1000 steps")
    run = Submitted.start(lab, tmp_path / "run", data, *endless, "cluster.time_limit=3 min", "cluster.save_lead=60 s")
    second = run.next_job(run.first_job)
    assert lab.wait_for(run.first_job, "COMPLETED", "FAILED", "TIMEOUT")["JobState"] == "COMPLETED", run.logs()
    run.when_trained(second, 1)
    assert nemotron3(lab, "stop", run.run_dir)[0] == 0
    assert lab.wait_for(second, "COMPLETED", "FAILED", "TIMEOUT", timeout_s=300)["JobState"] == "COMPLETED", run.logs()
    ends = [event for event in run.events() if event["event"] == "end"]
    assert [event["code"] for event in ends] == [75, 75]
    assert [event["verdict"].partition(":")[0] for event in ends] == ["again", "stopped"]
    # Both runs' learning rates are the same before the shorter one's decay, its last 4 steps.
    common = min(len(records(run.run_dir)), STEPS - 4)
    found, wanted = (pick(records(each.run_dir)[:common], BITWISE) for each in (run, undisturbed))
    assert found == wanted
