"""Runs beside one another: distances after as many tokens, one picture, one table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.telemetry import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.comparison import Compared, distance, draw_comparison
from nemotron3_megatron.telemetry.jsonlines import JsonLines
from nemotron3_megatron.telemetry.report import report_main

Step = Callable[..., StepRecord]
Evaluation = Callable[[int], EvalRecord]

SECOND_COLOUR = "#1f6fb2"


def constant(name: str, step: Step, loss: float, tokens_per_step: int, steps: int) -> Compared:
    made = [step(n, loss=loss, tokens=n * tokens_per_step) for n in range(1, steps + 1)]
    return Compared(name, tuple(made), ())


def test_losses_are_compared_after_as_many_tokens(step: Step) -> None:
    first = Compared("first", tuple(step(n, loss=10 - n * 0.01, tokens=n * 1000) for n in range(1, 401)), ())
    twice = Compared("twice", tuple(step(n, loss=11 - n * 0.02, tokens=n * 2000) for n in range(1, 301)), ())
    tokens, more = distance(first, twice)
    assert tokens[0] == 2000
    assert tokens[-1] == 400_000, "beyond the first run's end there is nothing to compare with"
    middle = slice(len(more) // 2, -60)  # away from the ends, where smoothing has fewer values
    assert more[middle] == pytest.approx(1.0, abs=1e-6)


def test_the_picture_shows_every_run(tmp_path: Path, step: Step) -> None:
    runs = [constant("a", step, 3.0, 100, 50), constant("b", step, 3.5, 100, 50)]
    draw_comparison(tmp_path / "two.png", runs)
    pixels = imread(tmp_path / "two.png")[..., :3]
    wanted = np.array([int(SECOND_COLOUR[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    seen = np.abs(pixels - wanted).max(axis=-1) < 0.03
    half = seen.shape[1] // 2
    assert seen[:, :half].sum() > 200
    assert seen[:, half:].sum() > 200
    with pytest.raises(ValueError, match="two runs"):
        draw_comparison(tmp_path / "one.png", runs[:1])


@pytest.fixture
def runs(tmp_path: Path, step: Step, evaluation: Evaluation) -> list[Path]:
    """A run, one that loses 0.5 more and takes twice as long, and one with the second one's name elsewhere."""
    found = []
    for place, more in (("fast", 0.0), ("slow", 0.5), ("elsewhere/slow", 0.25)):
        writer = JsonLines(tmp_path / place, None)
        for number in range(1, 101):
            record = step(number)
            writer.write(step(number, loss=record.loss + more, step_time_s=2.0 if more < 0.5 else 4.0))
        writer.write_eval(evaluation(100))
        writer.close()
        found.append(tmp_path / place)
    return found


def test_report_compares_with_other_runs(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert report_main([f"run_dir={runs[0]}", f"against={runs[1]}"]) == 0
    printed = capsys.readouterr().out
    assert "+0.5000" in printed
    assert "x2.000" in printed
    assert "+0.00%" in printed, "the validations are the same"
    assert f"wrote {runs[0] / 'comparison.png'}" in printed
    assert not (runs[0] / "report.html").exists()


def test_runs_of_one_name_are_told_apart(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    report_main([f"run_dir={runs[1]}", f"against={runs[2]}"])
    assert "elsewhere" in "".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("arguments", [[], ["against=x"], ["run_dir=a", "run_dir=b"], ["run_dir=a", "against=x,,y"]])
def test_wrong_arguments_say_what_is_right(arguments: list[str]) -> None:
    with pytest.raises(UserError, match=r"nemotron3 report run_dir=PATH \[against=PATH,...\]"):
        report_main(arguments)


def test_a_directory_without_a_run_is_named(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing"):
        report_main([f"run_dir={runs[0]}", f"against={tmp_path / 'nothing'}"])
