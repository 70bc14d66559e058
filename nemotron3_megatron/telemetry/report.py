"""``nemotron3 report``: what became of a run, from its records: PNG, terminal plot and one HTML file."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Layout
from nemotron3_megatron.plan.counts import count_parameters
from nemotron3_megatron.telemetry.comparison import PICTURE, comparison_table, draw_comparison, read_compared
from nemotron3_megatron.telemetry.curves import draw_loss_curve, smoothed
from nemotron3_megatron.telemetry.html import Picture, Section, page
from nemotron3_megatron.telemetry.jsonlines import read_evals, read_some_steps
from nemotron3_megatron.telemetry.precision_map import draw_precision_history, draw_precision_map
from nemotron3_megatron.telemetry.records import EvalRecord, StepRecord
from nemotron3_megatron.telemetry.report_health import draw_health, read_story, story_sections, tiles
from nemotron3_megatron.telemetry.run_record import RunRecord, read_run_record, unigram_entropy
from nemotron3_megatron.telemetry.scalars import most_flushed
from nemotron3_megatron.telemetry.tag_curves import draw_tag_losses, tag_section
from nemotron3_megatron.telemetry.terminal_plot import Series, plot
from nemotron3_megatron.telemetry.throughput import WARMUP_STEPS, format_count, format_duration

PLOT_WIDTH = 78
"""Characters; fits the narrowest common terminal."""


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a report is made from."""

    run_dir: Path
    record: RunRecord
    steps: tuple[StepRecord, ...]
    evals: tuple[EvalRecord, ...]
    unigram_entropy: float | None
    """Nats per token; None when the data has no manifest."""

    @property
    def validation_loss(self) -> float | None:
        """Of the last validation pass."""
        return self.evals[-1].validation_loss if self.evals else None


def report_main(overrides: Sequence[str]) -> int:
    """``nemotron3 report run_dir=PATH``: write pictures and ``report.html`` into it and plot in the terminal.

    With ``against=PATH,...`` the runs are compared instead, in one picture and one table.

    Raises:
        UserError: an argument is wrong or a directory holds no run.
    """
    run_dir, *others = _run_dirs(overrides)
    console = Console(width=None if Console().is_terminal else PLOT_WIDTH + 2)
    if others:
        written = [run_dir / PICTURE]
        runs = read_compared([run_dir, *others])
        draw_comparison(written[0], runs)
        console.print(comparison_table(runs))
    else:
        findings = read_findings(run_dir)
        written = write_report(findings)
        show_report(findings, console)
    console.print("\n".join(f"wrote {path}" for path in written), soft_wrap=True, highlight=False)
    return 0


def read_findings(run_dir: Path) -> Findings:
    """Read a run directory.

    Raises:
        UserError: it holds no run, or a run without a single step.
    """
    record = read_run_record(run_dir)
    steps = read_some_steps(run_dir)
    return Findings(run_dir, record, tuple(steps), tuple(read_evals(run_dir)), unigram_entropy(record.run))


def write_report(findings: Findings) -> list[Path]:
    """Write ``loss.png``, pictures of speed, health, tags and operands, and ``report.html`` into the run directory.

    Returns:
        The files, ``report.html`` last.
    """
    picture, document = findings.run_dir / "loss.png", findings.run_dir / "report.html"
    draw_loss_curve(
        picture,
        findings.steps,
        findings.evals,
        title=f"{findings.record.run.name}: loss over training",
        unigram_entropy=findings.unigram_entropy,
    )
    run, steps, story = findings.record.run, findings.steps, read_story(findings.run_dir, findings.steps)
    pictures = {picture: ("", "Loss curves"), **draw_health(findings.run_dir, run, steps, story)}
    if any(record.tags for record in steps) or any(record.tags for record in findings.evals):
        tags = findings.run_dir / "loss_by_tag.png"
        draw_tag_losses(tags, steps, findings.evals, title=f"{run.name}: loss by tag of the sources")
        pictures[tags] = ("Loss by tag", "Training loss (lines) and validation loss (dots) of each tag over steps")
    pictures |= _draw_operands(findings)
    shown = [Picture(title, shows, path.read_bytes()) for path, (title, shows) in pictures.items()]
    title = f"{findings.record.run.name}: training report"
    first, *others = _sections(findings)
    sections = [first, tag_section(steps, findings.evals), *story_sections(steps, findings.evals, story), *others]
    document.write_text(page(title, shown, sections, tiles(run, steps, findings.evals, story)), encoding="utf-8")
    return [*pictures, document]


def _draw_operands(findings: Findings) -> dict[Path, tuple[str, str]]:
    """Draw the sampled operands, if there are any; path -> heading, what is shown."""
    sampled = [record for record in findings.steps if record.precision]
    if not sampled:
        return {}
    name, last = findings.record.run.name, sampled[-1]
    history, layers = (findings.run_dir / f"precision_{what}.png" for what in ("history", "statistics"))
    draw_precision_history(history, sampled, title=f"{name}: elements flushed to zero, mean over layers")
    draw_precision_map(layers, last, title=f"{name}: quantised operands at step {last.step:,}")
    return {
        history: ("Quantisation", "Share of elements flushed to zero over steps"),
        layers: ("", f"Flushed share and relative error by layer at step {last.step}"),
    }


def show_report(findings: Findings, console: Console) -> None:
    """Print the loss curves and the summary."""
    console.print(plot(_series(findings), width=min(console.width - 2, 100), x_label="step"))
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in summary(findings):
        table.add_row(f"[dim]{name}[/dim]", value)
    console.print()
    console.print(table, highlight=False)


def summary(findings: Findings) -> list[tuple[str, str]]:
    """Names and values of the run's results, most wanted first."""
    steps, run = findings.steps, findings.record.run
    counts = count_parameters(run.model)
    steady = [record.tokens_per_s for record in steps[WARMUP_STEPS:] or steps]
    peak = max((record.peak_memory_gib for record in steps if record.peak_memory_gib is not None), default=None)
    rows = [("training loss", f"{float(smoothed([record.loss for record in steps])[-1]):.4f} (smoothed)")]
    if findings.validation_loss is not None:
        rows.append(("validation loss", _loss(findings.validation_loss)))
        rows += [(f"validation MTP {d}", f"{x:.4f}") for d, x in enumerate(findings.evals[-1].mtp_losses, start=1)]
    if findings.unigram_entropy is not None:
        rows.append(("unigram entropy", f"{_loss(findings.unigram_entropy)} of the validation data"))
    rows += [
        ("steps", f"{steps[-1].step} of {run.total_steps}"),
        ("tokens", format_count(steps[-1].tokens)),
        ("parameters", f"{format_count(counts.total)} ({format_count(counts.active)} active, {counts.mtp:,} MTP)"),
        ("layout", layout_text(run.layout)),
        ("precision", f"{run.precision.name} ({run.precision.dtype}{_backend(steps[-1])})"),
        ("throughput", f"{format_count(median(steady))} tokens/s (median)"),
        ("time in steps", format_duration(sum(record.step_time_s for record in steps))),
    ]
    if sampled := [record for record in steps if record.precision]:
        worst = most_flushed(sampled[-1].precision)
        rows.append(("flushed to zero", f"at most {worst.flush_to_zero:.1%} ({worst.label} of {worst.module})"))
    if peak is not None:
        rows.append(("peak memory", f"{peak:.2f} GiB (rank 0)"))
    refused = [record.step for record in steps if record.skipped]
    rows.append(("refused updates", f"{len(refused)}" + (f" (first at step {refused[0]})" if refused else "")))
    return rows


def layout_text(layout: Layout) -> str:
    """Parallel dimensions larger than 1, such as ``2 ranks: EP 2 · DP 2``."""
    sizes = {name.upper(): getattr(layout, name) for name in ("tp", "pp", "vpp", "cp", "ep", "etp", "dp")}
    parts = " · ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
    ranks = f"{layout.world_size} rank{'s' if layout.world_size > 1 else ''}"
    return f"{ranks}: {parts}" if parts else ranks


def _run_dirs(overrides: Sequence[str]) -> list[Path]:
    """The run to report, then those it is compared with."""
    where, nearest = "command line", "nemotron3 report run_dir=PATH [against=PATH,...]"
    given: dict[str, str] = {}
    for override in overrides:
        key, _, value = override.partition("=")
        if key not in ("run_dir", "against") or key in given or not all(value.split(",")):
            raise UserError(override, where=where, why="report knows run_dir and against, once each", nearest=nearest)
        given[key] = value
    if "run_dir" not in given:
        raise UserError("report", where=where, why="run_dir is not given", nearest=nearest)
    against = given["against"].split(",") if "against" in given else []
    return [Path(each) for each in (given["run_dir"], *against)]


def _series(findings: Findings) -> list[Series]:
    x = [record.step for record in findings.steps]
    losses = [record.loss for record in findings.steps]
    line = smoothed(losses) if any(map(math.isfinite, losses)) else losses
    series = [Series("train (smoothed)", x, [float(value) for value in line], "blue")]
    if findings.unigram_entropy is not None:
        level = findings.unigram_entropy
        series.insert(0, Series(f"unigram {level:.2f}", [x[0], x[-1]], [level, level], "magenta", line="dashed"))
    if findings.evals:
        at, values = zip(*((record.step, record.validation_loss) for record in findings.evals), strict=True)
        series.append(Series("validation", at, values, "bold yellow", mark="●"))
    return series


def _sections(findings: Findings) -> list[Section]:
    record = findings.record
    mtp = [f"MTP {depth + 1}" for depth in range(record.run.model.mtp_depths)]
    evals = [
        (f"{e.step:,}", f"{e.tokens:,}", e.stage, f"{e.validation_loss:.4f}", *(f"{x:.4f}" for x in e.mtp_losses))
        for e in findings.evals
    ]
    stages = [
        (
            s.name,
            f"{s.first_step:,}",
            f"{s.steps:,}",
            ", ".join(dict.fromkeys(f"{shape.seq_length:,}" for shape in s.shapes)),
            ", ".join(dict.fromkeys(f"{shape.global_batch_size:,}" for shape in s.shapes)),
        )
        for s in record.run.stages
    ]
    versions = [(name, found or "not installed") for name, found in record.versions.items()]
    about = [("git commit", record.git_commit or "unknown"), ("platform", record.platform), *versions]
    origins = [(o.key, o.value, o.default, o.place) for o in record.run.origins]
    return [
        Section("Results", (), summary(findings)),
        Section("Validation", ("step", "tokens", "stage", "loss", *mtp), evals),
        Section("Stages", ("stage", "first step", "steps", "sequence length", "global batch"), stages),
        Section("Values that differ from their defaults", ("key", "value", "default", "set in"), origins),
        Section("Software", (), about),
    ]


def _loss(nats: float) -> str:
    return f"{nats:.4f} (perplexity {math.exp(nats):.1f})" if nats < 20 else f"{nats:.4f}"


def _backend(record: StepRecord) -> str:
    return "" if record.precision_backend == "none" else f", {record.precision_backend}"
