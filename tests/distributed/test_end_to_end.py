"""The real ``train.py`` from start to exit code: killed, preempted, out of disk, resumed; and wrong input.

One run goes through every disturbance in turn (``disturbed``); in the end its record must be, bit for bit, that of
a run that nothing happened to. Both train two ranks (EP=2) with a checkpoint every second step.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from e2e_start import (
    REPOSITORY,
    STEPS,
    Outcome,
    Start,
    checkpoints,
    ended,
    files_of_at_most,
    overrides,
    records,
)

from nemotron3_megatron.config.serialize import from_json

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

BITWISE = ("step", "tokens", "stage", "loss", "mtp_losses", "grad_norm", "lr", "skipped")
"""Fields of a record that do not depend on the clock."""


@dataclass(frozen=True, slots=True)
class Disturbed:
    """A run that was started over and over."""

    run_dir: Path
    ends: dict[str, Outcome] = field(default_factory=dict)
    left: dict[str, list[str]] = field(default_factory=dict)
    """What was in the checkpoint directory after each start."""

    def note(self, name: str, outcome: Outcome) -> None:
        self.ends[name] = outcome
        self.left[name] = checkpoints(self.run_dir)


@pytest.fixture(scope="module")
def disturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    """The same command again and again; something happens in every start but the last."""
    run_dir = tmp_path_factory.mktemp("disturbed")
    run, command = Disturbed(run_dir), overrides(run_dir, data)
    with Start(command, torchrun=True) as start:
        start.signal_when(lambda: len(records(run_dir)) >= 3, 1, signal.SIGKILL)
        run.note("killed", start.wait())
    with files_of_at_most(100_000):
        run.note("disk full", ended(command))
    with Start(command, torchrun=True) as start:
        start.signal_when(lambda: ".step_00000004.partial" in checkpoints(run_dir), 0, signal.SIGKILL)
        run.note("killed while saving", start.wait())
    with Start(command) as start:
        start.signal_when(lambda: len(records(run_dir)) >= 5, 1, signal.SIGTERM)
        run.note("preempted", start.wait())
    run.note("finished", ended(command, torchrun=True))
    return run


def test_every_disturbance_was_one(disturbed: Disturbed) -> None:
    """Starts ended early and left what they should, so that the next test compares something."""
    left = disturbed.left
    assert disturbed.ends["killed"].codes == (1,), "torchrun reports 1"
    assert "step_00000002" in left["killed"]
    assert "step_00000004" not in left["disk full"]
    assert disturbed.ends["killed while saving"].codes == (1,)
    assert left["killed while saving"] == [".step_00000004.partial", "step_00000002"]
    assert f"step_{STEPS:08d}" not in left["preempted"]
    assert disturbed.ends["finished"].codes == (0,), disturbed.ends["finished"].output


def test_losses_are_bitwise_those_of_an_undisturbed_run(disturbed: Disturbed, undisturbed: Path) -> None:
    """No record is missing, doubled or out of place, and every number is the same to the last bit."""
    for name, keys in (("metrics.jsonl", BITWISE), ("validation.jsonl", None)):
        found, wanted = records(disturbed.run_dir, name), records(undisturbed, name)
        assert [pick(record, keys) for record in found] == [pick(record, keys) for record in wanted]
    assert [record["step"] for record in records(undisturbed)] == list(range(1, STEPS + 1))
    assert len({record["loss"] for record in records(undisturbed)}) == STEPS


def test_preemption_saves_and_asks_for_another_start(disturbed: Disturbed) -> None:
    """SIGTERM on one rank: both end at the same step boundary with code 75 (torchrun would make it 1)."""
    outcome = disturbed.ends["preempted"]
    assert outcome.codes == (75, 75), outcome.output
    assert "SIGTERM: saving at the next step boundary" in outcome.output
    assert disturbed.left["preempted"][-1] in {f"step_{step:08d}" for step in (5, 6, 7)}


def test_full_disk_keeps_the_previous_checkpoint(disturbed: Disturbed) -> None:
    outcome = disturbed.ends["disk full"]
    assert refused(outcome, "the checkpoint of step 4 could not be saved")
    assert "File too large" in outcome.output
    assert "step_00000002 is intact" in outcome.output
    assert disturbed.left["disk full"] == ["step_00000002"]


def test_run_record(undisturbed: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``run.json`` reads back into the very run that the command resolves to."""
    sys.modules.pop("train", None)
    monkeypatch.syspath_prepend(str(REPOSITORY))
    monkeypatch.setenv("WORLD_SIZE", "2")
    from train import prepare

    document = json.loads((undisturbed / "run.json").read_text())
    assert from_json(json.dumps(document["run"])) == prepare(overrides(undisturbed, data))
    assert document["versions"]["megatron-core"].startswith("0.19.")
    assert {"git_commit", "platform"} <= document.keys()


def test_metrics_have_the_documented_fields(undisturbed: Path) -> None:
    """DESIGN section 8: checks outside the repository rely on these."""
    for record in records(undisturbed):
        assert record["tokens"] == record["step"] * 8 * 64
        assert record["stage"] == "main"
        assert len(record["mtp_losses"]) == 2
        assert all(isinstance(record[key], float) for key in ("loss", "grad_norm", "lr", "tokens_per_s"))
    assert checkpoints(undisturbed) == [f"step_{step:08d}" for step in (4, 6, 8)], "keep_last is 3"


def test_changed_blend_is_refused_unless_allowed(undisturbed: Path, data: Path, tmp_path: Path) -> None:
    """Also another layout: one rank goes on with what two ranks saved."""
    for name in ("refused", "allowed"):
        shutil.copytree(undisturbed, tmp_path / name)
    more = [f"data.sources.more.path={data}/more", "max_steps=9", "parallel.ep=1"]
    allow = "checkpoint.allow_data_change=true"
    with (
        Start(overrides(tmp_path / "refused", data, *more), ranks=1) as first,
        Start(overrides(tmp_path / "allowed", data, *more, allow), ranks=1) as second,
    ):
        outcome = first.wait()
        assert refused(outcome, "the data differs from the checkpoint's")
        assert "source 'more' is new" in outcome.output
        assert allow in outcome.output
        outcome = second.wait()
    assert outcome.codes == (0,), outcome.output
    assert "going on with data that differs" in outcome.output
    assert records(tmp_path / "refused") == records(undisturbed)
    assert records(tmp_path / "allowed")[:STEPS] == records(undisturbed)
    assert [record["step"] for record in records(tmp_path / "allowed")[STEPS:]] == [STEPS + 1]


def test_damaged_data_is_refused(data: Path, tmp_path: Path) -> None:
    """Truncated tokens, a corrupt index, tokens of another vocabulary: found by the ranks, each named."""
    for name in ("truncated", "corrupt"):
        for suffix in (".bin", ".idx"):
            shutil.copy(data / f"train{suffix}", tmp_path / f"{name}{suffix}")
    os.truncate(tmp_path / "truncated.bin", 1000)
    with (tmp_path / "corrupt.idx").open("r+b") as index:
        index.seek(40)
        index.write(b"\xff" * 8)
    messages = {
        "truncated": (f"{tmp_path}/truncated.bin has 1,000 bytes", ()),
        "corrupt": (f"{tmp_path}/corrupt.idx is not a usable index", ()),
        "foreign": ("vocabulary has 32 entries", (f"data.sources.train.path={data}/train", "model.vocab_size=32")),
    }
    with ExitStack() as stack:
        starts = {}
        for name, (message, more) in messages.items():
            source = f"data.sources.train.path={tmp_path}/{name}"
            arguments = overrides(tmp_path / name, data, "parallel.ep=1", source, *more)
            starts[message] = stack.enter_context(Start(arguments, ranks=1))
        for message, start in starts.items():
            assert refused(start.wait(), message)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("model.hiden_size=32", "model.hidden_size"),
        ("optimizer.lr=fast", "optimizer.lr"),
        ("parallel.tp=3", "parallel.tp=3"),
        ("parallel.ep=3", "parallel.ep=3"),
        ("data.sources.train.path=/no/such/data", "/no/such/data.bin does not exist"),
        ("recipe=tinny", "tiny"),
    ],
)
def test_wrong_recipes_are_refused(wrong: str, message: str, data: Path, tmp_path: Path) -> None:
    assert refused(ended(overrides(tmp_path, data, "parallel.ep=1", wrong), ranks=1), message)
    assert not any(tmp_path.iterdir()), "nothing was begun"


def test_what_is_wrong_is_said_once(data: Path, tmp_path: Path) -> None:
    outcome = ended(overrides(tmp_path, data, "world_size=4"))
    assert refused(outcome, "2 processes were started")
    assert outcome.output.count("error: ") == 1


def refused(outcome: Outcome, message: str) -> bool:
    """Exit code 2 on every rank, a message that says ``message``, and no stack trace."""
    assert set(outcome.codes) == {2}, outcome.output
    assert "error: " in outcome.output
    assert message in outcome.output
    assert "Traceback" not in outcome.output, outcome.output
    return True


def pick(record: dict[str, Any], keys: Sequence[str] | None) -> dict[str, Any]:
    return record if keys is None else {key: record[key] for key in keys}
