"""TensorBoard and W&B through their own readers, and which writers a run gets."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nemotron3_megatron.config import Run
from nemotron3_megatron.telemetry import EvalRecord, OperandRecord, StepRecord
from nemotron3_megatron.telemetry.console import Console
from nemotron3_megatron.telemetry.jsonlines import JsonLines, read_steps
from nemotron3_megatron.telemetry.records import TagLoss
from nemotron3_megatron.telemetry.tensorboard import TensorBoard
from nemotron3_megatron.telemetry.writers import build_writers

Step = Callable[..., StepRecord]
Evaluation = Callable[[int], EvalRecord]


def curve(run_dir: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_events_read_back(tmp_path: Path, step: Step, evaluation: Evaluation) -> None:
    writer = TensorBoard(tmp_path, None)
    for number in (1, 2):
        writer.write(step(number))
    writer.write_eval(evaluation(2))
    writer.close()
    # Events hold float32: relative spacing 2**-24.
    assert curve(tmp_path, "train/loss") == [(n, pytest.approx(step(n).loss, rel=2**-23)) for n in (1, 2)]
    assert curve(tmp_path, "train/mtp_2_loss")[0] == (1, pytest.approx(step(1).mtp_losses[1], rel=2**-23))
    assert curve(tmp_path, "validation/loss") == [(2, pytest.approx(evaluation(2).validation_loss, rel=2**-23))]


def test_tensorboard_shows_operands_by_role(tmp_path: Path, step: Step, operands: tuple[OperandRecord, ...]) -> None:
    writer = TensorBoard(tmp_path, None)
    for number in (1, 2, 3):
        writer.write(step(number, precision=operands if number == 2 else ()))
    writer.close()
    flushed = "precision/flush_to_zero/mamba.in_proj"
    assert curve(tmp_path, f"{flushed}/gradient") == [(2, pytest.approx((0.1 + 0.3) / 2, rel=2**-23))]
    assert curve(tmp_path, f"{flushed}/gradient_columns") == [(2, pytest.approx(0.05, rel=2**-23))]
    assert curve(tmp_path, "precision/relative_error/mtp.eh_proj/weight") == [(2, pytest.approx(0.1, rel=2**-23))]


def test_tensorboard_shows_losses_by_tag(tmp_path: Path, step: Step, evaluation: Evaluation) -> None:
    writer = TensorBoard(tmp_path, None)
    writer.write(step(1, tags={"code": TagLoss(1.5, 10), "synthetic web": TagLoss(2.5, 20)}))
    writer.write(step(2, tags={"code": TagLoss(1.25, 30)}))
    writer.write_eval(dataclasses.replace(evaluation(2), tags={"code": TagLoss(1.75, 40)}))
    writer.close()
    assert curve(tmp_path, "train/loss_of/code") == [(1, 1.5), (2, 1.25)]
    assert curve(tmp_path, "train/loss_of/synthetic web") == [(1, 2.5)]
    assert curve(tmp_path, "validation/loss_of/code") == [(2, 1.75)]


def test_tensorboard_hides_what_a_resumed_run_repeats(tmp_path: Path, step: Step) -> None:
    first = TensorBoard(tmp_path, None)
    for number in range(1, 6):
        first.write(step(number, loss=9.0))
    first.close()
    second = TensorBoard(tmp_path, 3)
    for number in (4, 5, 6):
        second.write(step(number, loss=1.0))
    second.close()
    assert curve(tmp_path, "train/loss") == [(1, 9.0), (2, 9.0), (3, 9.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def test_the_source_of_truth_comes_first_and_every_step_reaches_it(run: Run, step: Step) -> None:
    quiet = dataclasses.replace(run, telemetry=dataclasses.replace(run.telemetry, wandb="disabled", tensorboard=False))
    writers = build_writers(quiet, None)
    assert [type(writer) for writer in writers] == [JsonLines, Console]
    for writer in writers:
        for number in range(1, 4):
            writer.write(step(number))
        writer.sync()
        writer.close()
    assert len(read_steps(run.run_dir)) == 3  # log_every is 10: it thins the console only


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make a package look missing, as a folder of its name in the working directory does."""

    def hide(package: str) -> None:
        from importlib.util import find_spec

        monkeypatch.setattr(
            "nemotron3_megatron.telemetry.writers.find_spec",
            lambda name: None if name == package else find_spec(name),
        )

    return hide


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_missing_package_is_a_warning_with_the_command(
    run: Run, package: str, without: Callable[[str], None], caplog: pytest.LogCaptureFixture
) -> None:
    without(package)
    wanted = dataclasses.replace(
        run.telemetry, tensorboard=package == "tensorboard", wandb="offline" if package == "wandb" else "disabled"
    )
    with caplog.at_level(logging.WARNING):
        writers = build_writers(dataclasses.replace(run, telemetry=wanted), None)
    assert len(writers) == 2
    assert f"pip install {package}" in caplog.text


class TestWandB:
    """Needs the package; nothing here touches a network."""

    @pytest.fixture(autouse=True)
    def _isolated(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        pytest.importorskip("wandb")
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            monkeypatch.delenv(name)
        for name in ("CACHE_DIR", "CONFIG_DIR", "DATA_DIR"):
            monkeypatch.setenv(f"WANDB_{name}", str(tmp_path / "wandb_home"))

    @pytest.mark.parametrize(
        ("wanted", "environment", "netrc", "mode"),
        [
            ("auto", {}, "", "offline"),
            ("auto", {"WANDB_API_KEY": "x"}, "", "online"),
            ("auto", {}, "machine api.wandb.ai login user password x\n", "online"),
            ("auto", {}, "machine elsewhere.example login user password x\n", "offline"),
            ("auto", {"WANDB_BASE_URL": "https://w.example:8080"}, "machine w.example login u password x\n", "online"),
            ("auto", {}, "this is no netrc file", "offline"),
            ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "", "offline"),
            ("auto", {"WANDB_MODE": "disabled"}, "", "disabled"),
            ("offline", {"WANDB_API_KEY": "x", "WANDB_MODE": "online"}, "", "offline"),
            ("online", {}, "", "online"),
        ],
    )
    def test_mode(self, wanted: str, environment: dict[str, str], netrc: str, mode: str, tmp_path: Path) -> None:
        from nemotron3_megatron.telemetry.weights_and_biases import resolve_mode

        file = tmp_path / "netrc"
        file.write_text(netrc)
        assert resolve_mode(wanted, environment, file) == mode
        assert resolve_mode("auto", {}, tmp_path / "absent") == "offline"

    def test_offline_runs_hold_the_records_under_one_id(self, run: Run, step: Step, evaluation: Evaluation) -> None:
        from nemotron3_megatron.telemetry.weights_and_biases import WandB

        run.run_dir.mkdir()
        for start in (1, 3):  # a run and its resumption
            writer = WandB(run, "offline")
            writer.write(step(start))
            writer.write_eval(evaluation(start))
            writer.close()
        run_id = (run.run_dir / "wandb_run_id").read_text().strip()
        files = list(run.run_dir.glob("wandb/offline-run-*/run-*.wandb"))
        assert files
        assert {file.name for file in files} == {f"run-{run_id}.wandb"}
        content = b"".join(file.read_bytes() for file in files)
        for name in (b"train/loss", b"validation/loss", b"train/mtp_2_loss"):
            assert name in content

    def test_a_service_that_is_down_is_one_warning(
        self, run: Run, step: Step, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        from nemotron3_megatron.telemetry import weights_and_biases

        # A port of this machine where nothing listens: connections are refused at once.
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 2 + "01234567")
        monkeypatch.setattr(weights_and_biases, "INIT_TIMEOUT_S", 2.0)
        monkeypatch.setattr(weights_and_biases, "FINISH_TIMEOUT_S", 2.0)
        run.run_dir.mkdir()
        writer = weights_and_biases.WandB(run, "online")
        writer.write(step(1))
        writer.close()
        assert caplog.text.count("W&B cannot start online") == 1
        assert list(run.run_dir.glob("wandb/offline-run-*"))
        written = [path for path in run.run_dir.rglob("*") if path.is_file()]
        assert not [path for path in written if b"0123456789abcdef" in path.read_bytes()]
