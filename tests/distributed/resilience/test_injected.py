"""The real ``train.py`` under injected faults: what it survives, and how it ends where it must end."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from e2e_start import STEPS, Outcome, Start, overrides, records

from nemotron3_megatron.resilience.board import read_root_causes
from nemotron3_megatron.telemetry.incidents import Incident, read_incidents
from nemotron3_megatron.telemetry.report import read_findings, write_report

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

BITWISE = ("step", "tokens", "loss", "mtp_losses", "grad_norm", "lr")


@pytest.fixture(scope="module")
def expected(undisturbed: Path) -> list[dict[str, Any]]:
    return bitwise(undisturbed)


def ended(arguments: list[str], *, torchrun: bool = False) -> Outcome:
    """How a start ended; it has long on a busy machine, where imports alone take a minute."""
    with Start(arguments, torchrun=torchrun) as start:
        return start.wait(600)


def bitwise(run_dir: Path) -> list[dict[str, Any]]:
    """Of each step the record that stands: the last one."""
    last = {record["step"]: {key: record[key] for key in BITWISE} for record in records(run_dir)}
    return [last[step] for step in sorted(last)]


def faulty(run_dir: Path, data: Path, faults: str, *more: str) -> list[str]:
    arguments: list[str] = overrides(run_dir, data, f"debug.fault={faults}", "debug.allow_faults=true", *more)
    return arguments


def test_a_killed_rank_is_restarted_by_torchrun(
    data: Path, expected: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--max-restarts``: new processes, the newest checkpoint, the same losses to the bit."""
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")  # what torchrun reads where no option is given
    run_dir = tmp_path / "run"
    outcome = ended(faulty(run_dir, data, "kill:rank=1,step=6"), torchrun=True)
    assert outcome.codes == (0,), outcome.output
    assert bitwise(run_dir) == expected
    starts = [incident.step for incident in read_incidents(run_dir) if incident.kind == "start"]
    assert starts == [0, 4]
    (cause,) = read_root_causes(run_dir)
    assert (cause.kind, cause.rank, cause.step, cause.stage) == ("lost_rank", 1, 6, "main")


@pytest.mark.parametrize(("fault", "code"), [("hang", 1), ("freeze", -signal.SIGKILL)])
def test_a_hang_ends_with_the_stack_of_the_rank_that_hangs(fault: str, code: int, data: Path, tmp_path: Path) -> None:
    """Also where it holds Python's lock, so that the process beside it must speak for it and end it."""
    run_dir = tmp_path / "run"
    # Far above a step of this model (0.4 s) even on a busy machine; the first step has a limit of its own.
    outcome = ended(faulty(run_dir, data, f"{fault}:rank=1,step=3", "resilience.step_timeout_s=20.0"))
    assert outcome.codes == (1, code), outcome.output
    assert outcome.output.count("failed: rank") == 1
    (cause,) = read_root_causes(run_dir)
    assert (cause.kind, cause.rank, cause.step, cause.phase) == ("hang", 1, 3, "step")
    assert ("native code has held Python's lock" in cause.error) == (fault == "freeze")
    assert "in _happen" in cause.stack
    assert "rank 0: step 3, step: " in cause.others
    stacks = {path.name: path.read_text() for path in run_dir.glob("stacks/*/*.txt")}
    assert set(stacks) == {f"rank_0000{rank}{kind}.txt" for rank in (0, 1) for kind in ("", "_native")}
    if fault == "freeze" and stacks["rank_00001_native.txt"].startswith("native stacks ("):
        assert "pause (" in stacks["rank_00001_native.txt"], "the C function that it is in"


@pytest.fixture(scope="module")
def troubled(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """A passing fault of hardware, a slow rank, a spike, and numbers that stay bad."""
    run_dir = tmp_path_factory.mktemp("troubled")
    faults = "flip:rank=1,step=3;slow:rank=1,step=2,steps=3,seconds=2;spike:step=6;nan:rank=1,step=8,times=0"
    # Of two ranks the median is the mean: at this factor 2 s are seen although a busy machine delays both by seconds.
    more = ("straggler_factor=1.1", "non_finite=fail")
    options = ("spike=rollback", "spike_nats=1.0", "spike_window_steps=4", "straggler_every=4 steps", *more)
    command = faulty(run_dir, data, faults, *(f"resilience.{option}" for option in options))
    return run_dir, ended(command)


def of_kind(run_dir: Path, kind: str) -> list[Incident]:
    return [incident for incident in read_incidents(run_dir) if incident.kind == kind]


def test_a_fault_that_does_not_come_back_leaves_no_trace(
    troubled: tuple[Path, Outcome], expected: list[dict[str, Any]]
) -> None:
    """The second computation also draws the same random numbers for stochastic rounding."""
    run_dir, _ = troubled
    (found,) = of_kind(run_dir, "transient")
    assert found.step == 3
    assert "non-finite gradients" in found.text
    assert "a fault of hardware" in found.text
    assert bitwise(run_dir)[:4] == expected[:4]


def test_a_spike_is_rolled_back_and_its_data_skipped(
    troubled: tuple[Path, Outcome], expected: list[dict[str, Any]]
) -> None:
    """Step 6 spikes, so the run goes on from the checkpoint of step 4 with the data of step 7 on."""
    run_dir, _ = troubled
    (spike,), (rollback,) = of_kind(run_dir, "spike"), of_kind(run_dir, "rollback")
    assert (spike.step, rollback.step) == (6, 4)
    assert "the same to the bit" in spike.text
    steps = [record["step"] for record in records(run_dir)]
    assert steps == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    refused = [record for record in records(run_dir) if record["skipped"]]
    assert [record["step"] for record in refused] == [6, 8]
    assert "nats above the median" in refused[0]["skip_reason"]
    again = [record["loss"] for record in records(run_dir)][6:8]
    assert again != [record["loss"] for record in expected][4:6], "the data of steps 5 and 6 must not come again"
    assert (run_dir / "checkpoints" / "abandoned_step_00000006").is_dir(), "saved in the step that was undone"


def test_a_slow_rank_is_named(troubled: tuple[Path, Outcome]) -> None:
    run_dir, outcome = troubled
    assert "2 ranks: step p50" in outcome.output
    named = [incident.text for incident in of_kind(run_dir, "straggler") if "starts its steps" in incident.text]
    assert any(text.startswith("rank 1 on ") for text in named), outcome.output
    times = json.loads((run_dir / "rank_times.json").read_text())
    assert times["step"] == STEPS
    assert [0 < rank["step_p50"] <= rank["step_p95"] for rank in times["ranks"]] == [True, True]


def test_numbers_that_stay_bad_end_the_run_in_one_voice(troubled: tuple[Path, Outcome]) -> None:
    run_dir, outcome = troubled
    assert outcome.codes == (1, 1)
    assert outcome.output.count("failed: rank") == 1
    (cause,) = read_root_causes(run_dir)
    assert cause.step == STEPS
    assert cause.error.startswith("nemotron3_megatron.train.callbacks.spikes.BadStepsError: a bad step")


def test_the_report_tells_the_story(troubled: tuple[Path, Outcome]) -> None:
    run_dir, _ = troubled
    *pictures, document = write_report(read_findings(run_dir))
    assert {"speed.png", "health_layers.png", "health_roles.png"} <= {path.name for path in pictures}
    html = document.read_text()
    for words in ("goodput", "BadStepsError", "rollback", "a fault of hardware", "Expert load (MaxVio)"):
        assert words in html, words
    assert 'src="http' not in html, "nothing is fetched"


def test_metrics_hold_health_of_sampled_steps(troubled: tuple[Path, Outcome]) -> None:
    run_dir, _ = troubled
    first, second = records(run_dir)[:2]
    assert set(first["health"]) == {
        "max_violation", "residual_rms", "router_bias_range", "layer_gradient_norm", "role_gradient_norm",
        "role_gradient_zeros",
    }  # fmt: skip
    assert "health" not in second
    (held_out,) = [json.loads(line) for line in (run_dir / "validation.jsonl").read_text().splitlines()][:1]
    assert set(held_out["health"]["max_violation"]) == {"1", "mtp 1"}
    assert os.stat(run_dir / "incidents.jsonl").st_size


def test_others_see_nothing_of_a_run(troubled: tuple[Path, Outcome]) -> None:
    """Of what training wrote; the report is this process' own."""
    run_dir, _ = troubled
    written = [path for path in (run_dir, *run_dir.rglob("*")) if path.suffix not in (".png", ".html")]
    assert len(written) > 20
    assert [path for path in written if path.lstat().st_mode & 0o007] == []
