"""Health and incidents: numbers, records, pictures, the report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.image import imread

from nemotron3_megatron.config import Run
from nemotron3_megatron.telemetry import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.health import SERIES, health_scalars, layer_order, max_violation
from nemotron3_megatron.telemetry.health_map import draw_layer_maps, draw_role_curves, draw_speed
from nemotron3_megatron.telemetry.incidents import Incident, IncidentLog, goodput, read_incidents
from nemotron3_megatron.telemetry.records import Health
from nemotron3_megatron.telemetry.report_health import Story, draw_health, story_sections, tiles
from nemotron3_megatron.telemetry.scalars import eval_scalars, step_scalars

HEALTH: Health = {
    "max_violation": {"1": 0.5, "10": 0.75, "mtp 0": math.nan},
    "residual_rms": {str(layer): 1.0 + layer for layer in range(10)},
    "role_gradient_norm": {"mamba.in_proj": 0.3, "router": 1e-4},
    "role_gradient_zeros": {"mamba.in_proj": 0.0, "router": 0.25},
}


@pytest.mark.parametrize(
    ("loads", "expected"), [((4.0, 4.0), 0.0), ((8.0, 0.0), 1.0), ((3.0, 1.0, 2.0), 0.5), ((0.0, 0.0), math.nan)]
)
def test_max_violation(loads: tuple[float, ...], expected: float) -> None:
    assert max_violation(loads) == pytest.approx(expected, nan_ok=True)


def test_rows_are_in_the_order_of_the_forward_pass() -> None:
    assert sorted(["mtp 1", "10", "2", "mtp 0"], key=layer_order) == ["2", "10", "mtp 0", "mtp 1"]


def test_a_record_keeps_health(step: Callable[..., StepRecord], evaluation: Callable[[int], EvalRecord]) -> None:
    record = step(1, health=HEALTH, time_s=12.5)
    again = StepRecord.from_json(record.to_json())
    assert again.health.keys() == HEALTH.keys()
    assert math.isnan(again.health["max_violation"].pop("mtp 0"))
    assert again.health["max_violation"] == {"1": 0.5, "10": 0.75}
    assert again.time_s == 12.5
    assert '"health"' not in step(2).to_json()
    held_out = dataclasses.replace(evaluation(5), health={"max_violation": {"1": 0.25}})
    assert EvalRecord.from_json(held_out.to_json()) == held_out


def test_scalars(step: Callable[..., StepRecord], evaluation: Callable[[int], EvalRecord]) -> None:
    record = step(1, health=HEALTH)
    scalars = step_scalars(record)
    assert scalars["health/max_violation/largest"] == 0.75
    assert scalars["health/role_gradient_zeros/router"] == 0.25
    assert scalars["health/mtp_2_gap"] == pytest.approx(0.6)
    held_out = dataclasses.replace(evaluation(5), health={"max_violation": {"1": 0.25, "3": 0.5}})
    assert eval_scalars(held_out)["validation/health/max_violation/largest"] == 0.5
    assert health_scalars("health", {}) == {}


def test_incidents_survive_a_torn_line(tmp_path: Path) -> None:
    clock = iter((1.0, 2.0))
    log = IncidentLog(tmp_path, writes=True, clock=lambda: next(clock))
    log.add("start", 0)
    log.add("spike", 7, "loss 9")
    IncidentLog(tmp_path, writes=False).add("end", 9)
    with (tmp_path / "incidents.jsonl").open("a") as file:
        file.write('{"kind": "end", "st')
    assert read_incidents(tmp_path) == [
        Incident(kind="start", step=0, time_s=1.0),
        Incident(kind="spike", step=7, text="loss 9", time_s=2.0),
    ]


def test_goodput_counts_what_stands(step: Callable[..., StepRecord]) -> None:
    """Ten steps of 2 s; the second start, 40 s after the first, did the last five again."""
    incidents = [Incident(kind="start", step=0, time_s=100.0), Incident(kind="start", step=5, time_s=140.0)]
    steps = [step(n, time_s=100.0 + 2 * n + (30 if n > 5 else 0)) for n in range(1, 11)]
    assert goodput(incidents, steps) == pytest.approx(20 / 50)
    assert goodput([], steps) is None
    assert goodput(incidents, [step(1)]) is None


def test_pictures(run: Run, step: Callable[..., StepRecord], tmp_path: Path) -> None:
    steps = [step(n, health=HEALTH if n % 10 == 0 or n == 1 else {}) for n in range(1, 41)]
    draw_layer_maps(tmp_path / "a.png", steps, pattern=run.model.pattern, title="t")
    draw_role_curves(tmp_path / "b.png", steps, title="t")
    draw_speed(tmp_path / "c.png", steps, {"spike": [7], "start": [0]}, title="t")
    for name in "abc":
        assert len({tuple(pixel) for pixel in imread(tmp_path / f"{name}.png")[::9, ::9].reshape(-1, 4)}) > 10
    with pytest.raises(ValueError, match="no step with health"):
        draw_layer_maps(tmp_path / "d.png", [step(1)], pattern="M", title="t")


def test_a_run_without_health_still_has_a_report(run: Run, step: Callable[..., StepRecord]) -> None:
    """Records of an earlier version hold none of it."""
    run.run_dir.mkdir()
    story = Story((), (), None)
    assert [path.name for path in draw_health(run.run_dir, run, [step(1)], story)] == ["speed.png"]
    assert all(not section.rows for section in story_sections([step(1)], [], story))
    assert ("0", "failures") in tiles(run, [step(1)], [], story)


def test_the_table_of_loads_names_the_worst(
    step: Callable[..., StepRecord], evaluation: Callable[[int], EvalRecord]
) -> None:
    last = {"max_violation": {str(layer): layer / 10 for layer in range(12)}}
    held_out = dataclasses.replace(evaluation(2), health={"max_violation": {"11": 2.0}})
    section = story_sections([step(1, health=last), step(2, health=last)], [held_out], Story((), (), None))[-1]
    assert [row[0] for row in section.rows] == [str(layer) for layer in range(4, 12)]
    assert section.rows[-1] == ("11", "1.100", "1.100", "2.000")


def test_every_series_has_a_title() -> None:
    assert set(HEALTH) <= set(SERIES)
