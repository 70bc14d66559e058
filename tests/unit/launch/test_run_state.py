"""What is read off a run directory: progress, segments, status, kernels' cache; and the question at a segment's end."""

from __future__ import annotations

import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from nemotron3_megatron.launch import chain, jit_cache, segments
from nemotron3_megatron.launch.chain import STOP, next_segment, stop_wanted
from nemotron3_megatron.launch.outcome import Outcome
from nemotron3_megatron.launch.progress import newest_checkpoint, recorded_step
from nemotron3_megatron.launch.slurm import Job
from nemotron3_megatron.launch.status import status_of
from nemotron3_megatron.launch.submission import Submission, World, write_submission
from nemotron3_megatron.launch.submit import prepare
from nemotron3_megatron.platform.kernel_cache import CACHE_VARIABLE
from nemotron3_megatron.telemetry.records import StepRecord


@pytest.fixture
def submission(tmp_path: Path) -> Submission:
    """Two stages: 2 nodes up to step 10, 4 nodes up to step 20."""
    _, plain = prepare(["recipe=tiny", f"run_dir={tmp_path}"])
    worlds = (World(stage="one", end_step=10, nodes=2, processes_per_node=2),)
    worlds += (World(stage="two", end_step=20, nodes=4, processes_per_node=2),)
    fields = {name: getattr(plain, name) for name in Submission.__slots__}
    made = Submission(**{**fields, "worlds": worlds, "total_steps": 20})
    write_submission(made)
    return made


def record(step: int, seconds: float = 2.0) -> StepRecord:
    return StepRecord(
        step=step, tokens=step * 10, stage="one", loss=4.0, grad_norm=1, lr=1, tokens_per_s=5, step_time_s=seconds
    )


def checkpoint(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / f"checkpoints/step_{step:08d}").mkdir(parents=True)


def test_progress_is_read_from_whole_checkpoints_and_whole_lines(tmp_path: Path) -> None:
    assert (newest_checkpoint(tmp_path), recorded_step(tmp_path)) == (0, 0)
    checkpoint(tmp_path, 5, 123456789, 10)
    (tmp_path / "checkpoints/.step_99999999.partial").mkdir()
    (tmp_path / "metrics.jsonl").write_text(record(11).to_json() + "\n" + record(12).to_json() + '\n{"step": 13, "lo')
    assert newest_checkpoint(tmp_path) == 123456789
    assert recorded_step(tmp_path) == 12


def test_segments_read_back_and_torn_lines_are_left_out(tmp_path: Path) -> None:
    segments.begin(tmp_path, "7.0", nodes=3)
    checkpoint(tmp_path, 5)
    segments.end(tmp_path, "7.0", Outcome(1, "E: x", 2, "n1"), "again: retry")
    segments.begin(tmp_path, "8.0", nodes=3)
    with (tmp_path / segments.FILE_NAME).open("a") as file:
        file.write('{"event": "end", "segm')
    first, second = segments.read_segments(tmp_path)
    assert (first.name, first.nodes, first.begin_checkpoint, first.end_checkpoint) == ("7.0", 3, 0, 5)
    assert (first.outcome, first.verdict) == (Outcome(1, "E: x", 2, "n1"), "again: retry")
    assert (second.name, second.begin_checkpoint, second.outcome) == ("8.0", 5, None)


def test_the_next_script_is_for_the_stage_in_force(submission: Submission) -> None:
    run_dir = submission.run_dir
    for step, nodes in ((9, 2), (10, 4), (20, 4)):
        segments.begin(run_dir, f"{step}.0", nodes=nodes)
        checkpoint(run_dir, step)
        next_segment(run_dir, f"{step}.0", 75)
        assert f"#SBATCH --nodes={nodes}\n" in (run_dir / "job.sbatch").read_text()


def test_a_failure_behind_a_change_of_layout_is_no_matter_for_the_same_job(submission: Submission) -> None:
    """Saved at the end of stage one, then broken: stage two needs other nodes."""
    run_dir = submission.run_dir
    segments.begin(run_dir, "7.0", nodes=2)
    checkpoint(run_dir, 9)
    assert next_segment(run_dir, "7.0", 1).here
    segments.begin(run_dir, "8.0", nodes=2)
    checkpoint(run_dir, 10)
    assert not next_segment(run_dir, "8.0", 1).here


def test_the_verdict_is_one_line_and_is_recorded(
    submission: Submission, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = submission.run_dir
    monkeypatch.setenv("NEMOTRON3_SEGMENT", "7.0")
    segments.begin(run_dir, "7.0", nodes=2)
    assert chain.launch_main(["next", str(run_dir), "code=1"]) == 0
    wait_s = round(submission.cluster.retry_wait.value)
    assert capsys.readouterr().out == f"here {wait_s}\n"
    (only,) = segments.read_segments(run_dir)
    assert only.outcome == Outcome(1, "srun ended with 1; no rank left a record")
    assert only.verdict.startswith("again: retry 1 of 3, in the same job, after: srun")


def test_a_stop_means_the_jobs_of_then(tmp_path: Path) -> None:
    assert not stop_wanted(tmp_path, "7.0")
    (tmp_path / STOP).write_text("7\n17\n")
    assert [stop_wanted(tmp_path, name) for name in ("7.0", "7.3", "17.0", "1.7", "18.0")] == [1, 1, 1, 0, 0]


def test_goodput_counts_each_step_once_and_all_held_time(
    submission: Submission, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Segments of 30, 20 (lost, until the next began) and, running, 10 s; 8 steps of 3 s are left of it."""
    times = iter([100.0, 130.0, 140.0, 160.0])
    monkeypatch.setattr("time.time", lambda: next(times))
    segments.begin(submission.run_dir, "1.0", nodes=2)
    segments.end(submission.run_dir, "1.0", Outcome(1, "E: x"), "again")
    segments.begin(submission.run_dir, "2.0", nodes=2)
    segments.begin(submission.run_dir, "2.1", nodes=2)
    found = segments.read_segments(submission.run_dir)
    steps = [record(step, 3.0) for step in range(1, 9)]
    status = status_of(submission, found, steps, [Job("2", "RUNNING", "None")], now=170.0)
    assert status.goodput == pytest.approx(8 * 3.0 / (30 + 20 + 10))
    assert status.eta_s == pytest.approx((20 - 8) * 3.0 / 0.4)
    assert (status.step, status.segments, status.last_error, status.jobs) == (8, 3, "E: x", ("2 RUNNING",))


def test_before_the_first_step_nothing_is_claimed(submission: Submission) -> None:
    status = status_of(submission, [], [], [Job("2", "PENDING", "Priority")], now=0.0)
    assert (status.step, status.eta_s, status.goodput, status.loss) == (0, None, None, None)
    assert status.jobs == ("2 PENDING (Priority)",)


def test_compiled_kernels_travel_through_the_run_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "unset")
    disk = tmp_path / "disk"
    disk.mkdir()
    first = jit_cache.fill(tmp_path, str(disk))
    assert first is not None
    assert first.stat().st_mode & 0o077 == 0, "another user could plant a kernel there"
    assert os.environ[CACHE_VARIABLE] == str(first)
    (first / "triton").mkdir()
    (first / "triton/kernel.cubin").write_bytes(b"code")
    jit_cache.keep(tmp_path, first)
    jit_cache.discard(first)
    assert not first.exists()
    second = jit_cache.fill(tmp_path, str(disk))
    assert second is not None
    assert second != first
    assert (second / "triton/kernel.cubin").read_bytes() == b"code"
    assert second.stat().st_mode & 0o077 == 0
    assert jit_cache.fill(tmp_path, None) is None


def test_an_archive_cannot_write_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "unset")
    with tarfile.open(tmp_path / jit_cache.ARCHIVE, "w") as packed:
        member = tarfile.TarInfo("../../evil")
        member.size = 1
        packed.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(tarfile.OutsideDestinationError):
        jit_cache.fill(tmp_path, str(tmp_path))
    assert not (tmp_path.parent / "evil").exists()


def test_status_is_json(
    submission: Submission, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemotron3_megatron import cli

    monkeypatch.setenv("PATH", "")  # no squeue
    assert cli.main(["status", str(submission.run_dir), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["total_steps"] == 20
    assert cli.main(["status", str(submission.run_dir / "none")]) == 2
