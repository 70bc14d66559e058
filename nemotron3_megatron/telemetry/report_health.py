"""The parts of a report about health and incidents: pictures, tiles, tables."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from nemotron3_megatron.config.run import Run
from nemotron3_megatron.resilience.board import read_root_causes
from nemotron3_megatron.resilience.failure import Failure
from nemotron3_megatron.telemetry.health import layer_order
from nemotron3_megatron.telemetry.health_map import draw_layer_maps, draw_role_curves, draw_speed
from nemotron3_megatron.telemetry.html import Section
from nemotron3_megatron.telemetry.incidents import Incident, goodput, read_incidents
from nemotron3_megatron.telemetry.records import EvalRecord, Health, StepRecord
from nemotron3_megatron.telemetry.throughput import format_count

_SHOWN_INCIDENTS = 200


@dataclass(frozen=True, slots=True)
class Story:
    """What happened around the steps."""

    incidents: tuple[Incident, ...]
    failures: tuple[Failure, ...]
    goodput: float | None


def read_story(run_dir: Path, steps: Sequence[StepRecord]) -> Story:
    """Incidents and root causes of a run directory; empty for a run that recorded none."""
    incidents = read_incidents(run_dir)
    return Story(tuple(incidents), tuple(read_root_causes(run_dir)), goodput(incidents, steps))


def draw_health(run_dir: Path, run: Run, steps: Sequence[StepRecord], story: Story) -> dict[Path, tuple[str, str]]:
    """Draw what there is; path -> heading, what is shown."""
    speed = run_dir / "speed.png"
    draw_speed(speed, steps, _steps_of(story), title=f"{run.name}: throughput")
    pictures = {speed: ("Throughput", "Tokens a second over steps, step times, incidents")}
    if any(record.health for record in steps):
        layers, roles = run_dir / "health_layers.png", run_dir / "health_roles.png"
        draw_layer_maps(layers, steps, pattern=run.model.pattern, title=f"{run.name}: health by layer and step")
        draw_role_curves(roles, steps, title=f"{run.name}: gradients by role, and MTP")
        pictures[layers] = ("Health", "Expert load, residual stream, gradients and router bias by layer and step")
        pictures[roles] = ("", "Gradient norm and zeros of each role over steps; MTP losses against the main loss")
    return pictures


def tiles(run: Run, steps: Sequence[StepRecord], evals: Sequence[EvalRecord], story: Story) -> list[tuple[str, str]]:
    """The numbers one looks for first: value and name."""
    last = steps[-1]
    refused = sum(record.skipped for record in steps)
    found = [(f"{last.step:,} / {run.total_steps:,}", "steps"), (f"{last.loss:.4f}", "training loss")]
    if evals:
        found.append((f"{evals[-1].validation_loss:.4f}", "validation loss"))
    found += [
        (format_count(last.tokens), "tokens seen"),
        (format_count(median(record.tokens_per_s for record in steps)), "tokens a second"),
    ]
    if story.goodput is not None:
        found.append((f"{story.goodput:.1%}", "goodput"))
    found.append((str(refused), "refused updates"))
    found.append((str(len(story.failures)), "failures"))
    return found


def story_sections(steps: Sequence[StepRecord], evals: Sequence[EvalRecord], story: Story) -> list[Section]:
    """Tables of failures, incidents and the layers whose experts are least balanced."""
    failures = [
        (_clock(f.time_s), f"{f.step:,}", f.stage, f.phase, f"{f.rank} on {f.host}", f"{f.error} {f.others}".strip())
        for f in story.failures
    ]
    incidents = [(_clock(i.time_s), f"{i.step:,}", i.kind, i.text) for i in story.incidents[-_SHOWN_INCIDENTS:]]
    return [
        Section("Failures", ("time", "step", "stage", "phase", "rank", "root cause"), failures),
        Section("Incidents", ("time", "step", "kind", "what"), incidents),
        Section("Expert load (MaxVio)", ("layer", "first", "last", "validation"), _loads(steps, evals)),
    ]


def _loads(steps: Sequence[StepRecord], evals: Sequence[EvalRecord]) -> list[tuple[str, str, str, str]]:
    """The layers with the largest last value, at most eight."""
    measured = [found for record in steps if (found := _violations(record.health))]
    if not measured:
        return []
    held_out = next((found for record in reversed(evals) if (found := _violations(record.health))), {})
    first, last = measured[0], measured[-1]
    worst = sorted(last, key=lambda row: last[row], reverse=True)[:8]
    return [
        (row, _number(first.get(row)), _number(last.get(row)), _number(held_out.get(row)))
        for row in sorted(worst, key=layer_order)
    ]


def _violations(health: Health) -> dict[str, float]:
    return health.get("max_violation", {})


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _steps_of(story: Story) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for incident in story.incidents:
        if incident.kind != "end":
            found.setdefault(incident.kind, []).append(incident.step)
    if story.failures:
        found["failure"] = [failure.step for failure in story.failures]
    return found


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))
