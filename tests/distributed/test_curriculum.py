"""A curriculum of three stages, the last under another layout: stopped and killed anywhere, it trains on the same
samples as undisturbed, in the same order, each once."""

from __future__ import annotations

import json
import signal
from collections import defaultdict
from pathlib import Path

import pytest
from e2e_start import Start, checkpoints, ended, overrides, records, write_corpus

from nemotron3_megatron.checkpoint.store import load_state

pytestmark = [pytest.mark.timeout(1800), pytest.mark.slow]

STEPS, CHANGE = 12, 8
CURRICULUM = (
    f"max_steps={STEPS}",
    "stages.main.tokens=4 steps",
    "stages.main.global_batch_size=null",
    "stages.main.batch_tokens=512",
    "stages.main.blend=first",
    "stages.main.batch_rampup={start_tokens: 256, increment_tokens: 256, over: '2 steps'}",
    "stages.next={tokens: '4 steps', seq_length: 64, batch_tokens: 512, blend: second}",
    "stages.long={tokens: '4 steps', seq_length: 128, batch_tokens: 512, lr: 1e-4, blend: second, parallel: {cp: 2},"
    " other_lengths: {short: {seq_length: 32, blend: first}}}",
    "data.blends.first={train: 3, more: 1}",
    "data.blends.second={more: 1, train: 1}",
    "telemetry.samples=true",
    "telemetry.eval_every=null",
    "checkpoint.keep_last=null",
)
BITWISE = ("step", "tokens", "stage", "loss", "mtp_losses", "grad_norm", "lr")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    for seed, name in enumerate(("train", "validation", "more")):
        write_corpus(folder / name, seed=seed, documents=120)
    return folder


def command(run_dir: Path, data: Path, *more: str) -> list[str]:
    return overrides(run_dir, data, *CURRICULUM, f"data.sources.more.path={data}/more", *more)


@pytest.fixture(scope="module")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two starts: the second one for the stage with another layout."""
    run_dir = tmp_path_factory.mktemp("undisturbed")
    first = ended(command(run_dir, data))
    assert first.codes == (75, 75), first.output
    assert checkpoints(run_dir)[-1] == f"step_{CHANGE:08d}"
    second = ended(command(run_dir, data))
    assert second.codes == (0, 0), second.output
    return run_dir


@pytest.fixture(scope="module")
def disturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Killed in the first stage, preempted in the second, killed as soon as the last checkpoint before the change of
    layout is there, killed in the third."""
    run_dir = tmp_path_factory.mktemp("disturbed")
    moments = (
        (lambda: len(records(run_dir)) >= 3, signal.SIGKILL),
        (lambda: len(records(run_dir)) >= 5, signal.SIGTERM),
        (lambda: f"step_{CHANGE:08d}" in checkpoints(run_dir), signal.SIGKILL),
        (lambda: len(records(run_dir)) >= 11, signal.SIGKILL),
    )
    for ready, number in moments:
        with Start(command(run_dir, data), torchrun=number == signal.SIGKILL) as start:
            start.signal_when(ready, 1, number)
            start.wait()
    last = ended(command(run_dir, data))
    assert last.codes == (0, 0), last.output
    return run_dir


def test_every_sample_is_that_of_an_undisturbed_run(disturbed: Path, undisturbed: Path) -> None:
    assert records(disturbed, "samples.jsonl") == records(undisturbed, "samples.jsonl")
    found, wanted = records(disturbed), records(undisturbed)
    assert [[record[key] for key in BITWISE] for record in found] == [
        [record[key] for key in BITWISE] for record in wanted
    ]
    assert records(disturbed, "boundaries.jsonl") == records(undisturbed, "boundaries.jsonl")


def test_no_sample_is_repeated_or_skipped(undisturbed: Path) -> None:
    """Every source's stream of each length is read window after window, through all stages and layouts."""
    lines = records(undisturbed, "samples.jsonl")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    streams = defaultdict(list)
    for line in lines:
        for source, index in line["samples"]:
            streams[source, line["seq_length"]].append(index)
    assert set(streams) == {(source, length) for source in ("train", "more") for length in (64, 128, 32)}
    assert all(indices == list(range(len(indices))) for indices in streams.values())


def test_batches_grow_and_lengths_alternate(undisturbed: Path) -> None:
    lines = records(undisturbed, "samples.jsonl")
    assert [line["seq_length"] for line in lines] == [64] * 8 + [128, 32, 128, 32]
    assert [len(line["samples"]) for line in lines] == [4, 4, 8, 8, 8, 8, 8, 8, 4, 16, 4, 16]
    tokens = [record["tokens"] for record in records(undisturbed)]
    assert tokens == [256, 512, *(512 + 512 * step for step in range(1, 11))]
    counts = {name: sum(s == name for line in lines[:4] for s, _ in line["samples"]) for name in ("train", "more")}
    assert counts == {"train": 18, "more": 6}


def test_boundaries_are_reported_with_both_sides(undisturbed: Path) -> None:
    same, other = records(undisturbed, "boundaries.jsonl")
    assert [(each["before"]["stage"], each["after"]["stage"]) for each in (same, other)] == [
        ("main", "next"),
        ("next", "long"),
    ]
    assert [(each["before"]["step"], each["after"]["step"]) for each in (same, other)] == [(4, 5), (8, 9)]
    by_step = {record["step"]: record for record in records(undisturbed)}
    for each in (same, other):
        for side in (each["before"], each["after"]):
            for key in ("tokens", "lr", "loss", "grad_norm"):
                assert side[key] == by_step[side["step"]][key]
    assert (other["before"]["layout"], other["after"]["layout"]) == ("tp1 cp1 pp1 ep2 dp2", "tp1 cp2 pp1 ep1 dp1")
    assert other["after"]["lr"] == 1e-4
    assert other["before"]["drawn"]["64"] == other["after"]["drawn"]["64"]


def test_a_changed_blend_is_refused_and_recorded_when_allowed(undisturbed: Path, data: Path) -> None:
    refused = ended(command(undisturbed, data, "data.blends.second={more: 3, train: 1}"))
    assert refused.codes == (2, 2), refused.output
    assert "source 'more' has the share 3/4, was 1/2 in stage next" in refused.output
    state = load_state(undisturbed / "checkpoints" / f"step_{STEPS:08d}")
    assert state["data"]["lineage"] == []
    assert json.loads(json.dumps(state["last_step"]))["step"] == STEPS
