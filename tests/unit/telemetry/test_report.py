"""Reports of a made-up run: the picture has its curves, the page stands on its own."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.image import imread

from nemotron3_megatron.config import Run
from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.recipe import SourceConfig
from nemotron3_megatron.config.serialize import to_json
from nemotron3_megatron.telemetry import EvalRecord, OperandRecord, StepRecord
from nemotron3_megatron.telemetry.curves import draw_loss_curve, smoothed
from nemotron3_megatron.telemetry.jsonlines import JsonLines
from nemotron3_megatron.telemetry.records import TagLoss
from nemotron3_megatron.telemetry.report import read_findings, report_main, summary

Step = Callable[..., StepRecord]
Evaluation = Callable[[int], EvalRecord]

ENTROPY = 6.25


@pytest.fixture
def run_dir(run: Run, step: Step, evaluation: Evaluation, tmp_path: Path) -> Path:
    """A run directory with 100 steps, 2 evaluations, and a data manifest."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "manifest.json").write_text(json.dumps({"unigram": {"validation_entropy": ENTROPY}}))
    held_out = {"validation": SourceConfig(path=str(tmp_path / "data" / "validation"))}
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, validation=held_out))
    writer = JsonLines(run.run_dir, None)
    for number in range(1, 101):
        writer.write(step(number, skipped=number == 30, skip_reason="<b>non-finite</b>"))
        if number % 50 == 0:
            writer.write_eval(evaluation(number))
    writer.close()
    record = {"run": json.loads(to_json(run)), "versions": {"torch": "<2>"}, "git_commit": None, "platform": "cpu & co"}
    (run.run_dir / "run.json").write_text(json.dumps(record))
    return run.run_dir


def pixels(path: Path, colour: str) -> int:
    """How many pixels of the picture are close to a colour."""
    wanted = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return int((np.abs(imread(path)[..., :3] - wanted).max(axis=-1) < 0.03).sum())


def test_the_picture_shows_every_curve(tmp_path: Path, step: Step, evaluation: Evaluation) -> None:
    steps, evals = [step(n) for n in range(1, 101)], [evaluation(n) for n in (50, 100)]
    bare = tmp_path / "bare.png"
    draw_loss_curve(bare, [dataclasses.replace(s, mtp_losses=()) for s in steps], [], title="t")
    full = tmp_path / "full.png"
    draw_loss_curve(full, steps, evals, title="t", unigram_entropy=ENTROPY)
    assert imread(full).shape[:2] == (1120, 1760)
    train, rate = "#1f6fb2", "#2b8a3e"
    assert pixels(bare, train) > 500
    assert pixels(bare, rate) > 500
    for extra in ("#d9480f", "#5f3dc4", "#8c9bab"):  # validation, unigram entropy, MTP depth 1
        assert pixels(full, extra) > pixels(bare, extra) + 300


@pytest.mark.parametrize("losses", [[math.nan], [1.0], [1.0, math.nan, 3.0], [math.nan] * 5, [1e30, 1.0, 1.0]], ids=str)
def test_any_run_can_be_drawn(tmp_path: Path, step: Step, losses: list[float]) -> None:
    draw_loss_curve(tmp_path / "x.png", [step(n, loss=x, lr=0.0) for n, x in enumerate(losses, 1)], [], title="t")
    assert (tmp_path / "x.png").stat().st_size > 10_000


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=60))
def test_smoothing_stays_between_the_extremes(values: list[float]) -> None:
    line = smoothed(values)
    assert len(line) == len(values)
    assert min(values) - 1e-6 <= line.min()
    assert line.max() <= max(values) + 1e-6


def test_smoothing_removes_noise_and_does_not_lag() -> None:
    x = np.linspace(0, 1, 1000)
    noise = np.random.default_rng(0).normal(scale=0.1, size=1000)
    line = smoothed(list(5 - 3 * x + noise))
    # The mean of n independent values has 1/sqrt(n) of their deviation; a Gaussian window of sigma 20 counts
    # 2 sqrt(pi) 20 = 71 of them. Five deviations leave room for the largest of 1000; the edges see half a window.
    bound = 5 * 0.1 / math.sqrt(71)
    assert np.abs(line - (5 - 3 * x))[60:-60].max() < bound


def test_smoothing_bridges_what_is_not_finite() -> None:
    assert smoothed([1.0, math.nan, 1.0]) == pytest.approx([1.0, 1.0, 1.0])
    assert np.isnan(smoothed([math.nan, math.inf])).all()


class _Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.cells: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.cells.append(data.strip())


def test_the_page_is_self_contained_and_complete(run_dir: Path) -> None:
    assert report_main([f"run_dir={run_dir}"]) == 0
    text = (run_dir / "report.html").read_text()
    found = _Page()
    found.feed(text)
    assert len(found.links) == 2
    assert all(link.startswith("data:image/png;base64,iVBOR") for link in found.links)
    assert not {"script", "link", "iframe"} & found.tags
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert {"validation loss", "<2>", "cpu & co", "telemetry.wandb", "command line", "50", "100"} <= set(found.cells)


def test_sampled_operands_are_drawn_and_summed_up(
    run_dir: Path, step: Step, operands: tuple[OperandRecord, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    writer = JsonLines(run_dir, 100)
    writer.write(step(101, precision=operands))
    writer.close()
    report_main([f"run_dir={run_dir}"])
    found = _Page()
    found.feed((run_dir / "report.html").read_text())
    assert len(found.links) == 4
    assert "Quantisation" in found.cells
    assert "at most 30.0% (gradient of decoder.layers.2.mixer.in_proj)" in found.cells
    written = capsys.readouterr().out
    for name in ("precision_history.png", "precision_statistics.png"):
        assert f"wrote {run_dir / name}" in written
        assert (run_dir / name).read_bytes().startswith(b"\x89PNG")


def test_losses_by_tag_are_drawn_and_tabulated(run_dir: Path, step: Step, evaluation: Evaluation) -> None:
    """Code is read in every step, web in every other one; 100 steps of 10 tokens are 1.00k."""
    code, web = TagLoss(2.0, 10), TagLoss(4.0, 30)
    writer = JsonLines(run_dir, 0)
    for number in range(1, 101):
        writer.write(step(number, tags={"code": code, **({"web": web} if number % 2 else {})}))
    writer.write_eval(dataclasses.replace(evaluation(100), tags={"code": TagLoss(2.25, 80)}))
    writer.close()
    report_main([f"run_dir={run_dir}"])
    found = _Page()
    found.feed((run_dir / "report.html").read_text())
    first = found.cells.index("tokens with loss") + len(("tokens with loss", "training (smoothed)", "validation"))
    rows = [cell for cell in found.cells[first:] if cell][:7]
    assert rows == ["code", "1.00k", "2.0000", "2.2500", "web", "1.50k", "4.0000"]
    picture = run_dir / "loss_by_tag.png"
    assert all(pixels(picture, colour) > 1000 for colour in ("#1f77b4", "#ff7f0e"))  # the first colours of tab10


def test_the_terminal_shows_curves_and_results(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_main([f"run_dir={run_dir}"])
    out = capsys.readouterr().out
    assert max(len(line) for line in out.splitlines() if not line.startswith("wrote")) <= 80
    assert out.count("●") == 2 + 1  # two passes and the legend
    assert "unigram 6.25" in out
    assert str(run_dir / "report.html") in out


def test_the_summary_counts_what_happened(run_dir: Path, evaluation: Evaluation) -> None:
    rows = dict(summary(read_findings(run_dir)))
    assert rows["validation loss"].startswith(f"{evaluation(100).validation_loss:.4f} (perplexity ")
    assert rows["refused updates"] == "1 (first at step 30)"
    assert rows["steps"] == "100 of 489"
    assert rows["time in steps"] == "3m20s"
    assert rows["layout"] == "2 ranks: EP 2 · DP 2"
    assert rows["throughput"] == "2.05k tokens/s (median)"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], "run_dir is not given"),
        (["run_dir=a", "run_dir=b"], "once each"),
        (["rundir=a"], "knows run_dir and against"),
        (["run_dir="], "knows run_dir and against"),
        (["run_dir=/nowhere/at/all"], "holds no run.json"),
    ],
)
def test_wrong_arguments_are_explained(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        report_main(overrides)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"run": 1, "versions": {}, "git_commit": null, "platform": ""}']
)
def test_a_broken_run_record_is_explained(run_dir: Path, text: str) -> None:
    (run_dir / "run.json").write_text(text)
    with pytest.raises(UserError, match=r"run\.json"):
        read_findings(run_dir)


def test_without_steps_there_is_no_report(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step yet"):
        read_findings(run_dir)


def test_the_entropy_is_known_only_from_a_whole_manifest(run_dir: Path, tmp_path: Path) -> None:
    assert read_findings(run_dir).unigram_entropy == ENTROPY
    (tmp_path / "data" / "manifest.json").write_text('{"unigram": null}')
    assert read_findings(run_dir).unigram_entropy is None
