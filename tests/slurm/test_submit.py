"""What Slurm itself says of our scripts, and chains that end or change their shape by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
from e2e_start import records
from lab import GPUS, Lab
from submitted import Submitted, arguments_of, nemotron3

pytestmark = [pytest.mark.timeout(1800)]


def test_slurm_validates_a_dry_run(lab: Lab, data: Path, tmp_path: Path) -> None:
    code, out, err = nemotron3(lab, "submit", *arguments_of(tmp_path / "a b'$(x)", data), "--dry-run")
    assert code == 0, err
    assert out.startswith("#!/bin/bash")
    assert "to start at" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("override", "refused"),
    [
        (f"cluster.gpus_per_node={GPUS}", False),
        (f"cluster.gpus_per_node={GPUS + 1}", True),
        ("cluster.partition=no_such", True),
        ("world_size=4", True),
        ("cluster.sbatch_options=[--no-such-option]", True),
    ],
)
def test_what_slurm_refuses_is_not_submitted_and_leaves_nothing(
    lab: Lab, data: Path, tmp_path: Path, override: str, refused: bool
) -> None:
    arguments = arguments_of(tmp_path / "run", data, override)
    code, _, err = nemotron3(lab, "submit", *arguments, *([] if refused else ["--dry-run"]))
    assert (code, "Slurm refuses the job" in err) == ((2, True) if refused else (0, False)), err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_same_failure_twice_ends_the_chain_with_its_reason(lab: Lab, data: Path, tmp_path: Path) -> None:
    fault = (
        "debug.allow_faults=true",
        'debug.fault="exception:rank=1,step=7,times=0"',
        "cluster.restarts_in_job=0",
    )
    run = Submitted.start(lab, tmp_path / "run", data, *fault)
    assert lab.wait_for(run.first_job, "FAILED", "COMPLETED", timeout_s=400)["JobState"] == "FAILED"
    second = run.next_job(run.first_job)
    assert lab.wait_for(second, "FAILED", "COMPLETED", timeout_s=400)["JobState"] == "FAILED"
    last = run.events()[-1]
    assert last["verdict"].startswith(f"failed: the same error at the same step (6) as in segment {run.first_job}.0")
    assert last["rank"] == 1
    assert lab.jobs()[-1] == second, "nothing follows"
    code, out, _ = nemotron3(lab, "status", run.run_dir)
    assert code == 0
    assert "last error" in out
    assert "none in the queue" in out


@pytest.mark.slow
def test_stages_on_different_numbers_of_nodes_follow_each_other(lab: Lab, data: Path, tmp_path: Path) -> None:
    """Two nodes, then one; nobody is asked in between."""
    late = "stages.late={tokens: 4 steps, seq_length: 64, global_batch_size: 8, micro_batch_size: 2, world_size: 1,"
    late += " parallel: {ep: 1}}"
    run = Submitted.start(lab, tmp_path / "run", data, "stages.main.tokens=4 steps", "max_steps=null", late)
    assert lab.wait_for(run.first_job, "COMPLETED", "FAILED", timeout_s=400)["JobState"] == "COMPLETED", run.logs()
    second = run.next_job(run.first_job)
    assert lab.wait_for(second, "COMPLETED", "FAILED", timeout_s=400)["JobState"] == "COMPLETED", run.logs()
    assert [(event["nodes"], event["checkpoint"]) for event in run.events() if event["event"] == "begin"] == [
        (2, 0),
        (1, 4),
    ]
    assert [(record["step"], record["stage"]) for record in records(run.run_dir)] == [
        *((step, "main") for step in range(1, 5)),
        *((step, "late") for step in range(5, 9)),
    ]
