"""From one stage to the next: when a start must end for it, and a report of what was before and what is after."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from nemotron3_megatron.config.errors import UserError
from nemotron3_megatron.config.run import Run, Stage
from nemotron3_megatron.data.composition import blend_of
from nemotron3_megatron.train.callbacks.base import Callback, StepEvent, Stop
from nemotron3_megatron.train.callbacks.samples import drop_lines_after
from nemotron3_megatron.train.schedule import learning_rate

_log = logging.getLogger(__name__)

BOUNDARIES = "boundaries.jsonl"

Side = dict[str, Any]
"""What the report says of a step: JSON values by the name of a row."""


class Boundaries(Callback):
    """Ends a start where the next stage has another layout or precision; reports every first step of a stage.

    What the step before was is kept in the checkpoint (``last_step``), so that a report reaches over starts.
    """

    def __init__(
        self, run: Run, drawn: Callable[[], Mapping[str, Any]], last_step: Side | None, console: Console | None
    ) -> None:
        """Prepare.

        Args:
            run: has the stages.
            drawn: samples that were drawn since the beginning, by sequence length and source.
            last_step: of the checkpoint; None: there is none, or an older one.
            console: of rank 0, which writes the reports; None elsewhere.
        """
        self._run = run
        self._drawn = drawn
        self._console = console
        self.last_step = last_step

    def wants_stop(self, step: int) -> Stop | None:
        ends = step < self._run.total_steps and not self._run.can_train(self._run.stage_at(step))
        return Stop.NEXT_LAYOUT if ends else None

    def step_done(self, event: StepEvent) -> None:
        before, after = self.last_step, side(self._run, event, self._drawn())
        self.last_step = after
        if self._console is None or before is None or before["stage"] == after["stage"]:
            return
        write_report(self._run.run_dir / BOUNDARIES, before, after)
        self._console.print(report_table(before, after))


def check_continues(run: Run, source: Path, step: int, tokens: int) -> None:
    """Refuse stages that count other tokens until a checkpoint's step than it has seen.

    Everything in tokens, the learning rate first, would jump there without a word.

    Raises:
        UserError: they do.
    """
    if (counted := run.tokens_at(step)) != tokens:
        raise UserError(
            f"checkpoint {source} has seen {tokens:,} tokens in {step} steps",
            where="stages",
            why=f"these stages count {counted:,} until there, so that learning rate and token counts would jump",
            nearest="leave what is done as it was: end that stage there (tokens: 'N steps') and add a new one",
        )


def warn_of_rate(run: Run, state: Mapping[str, Any]) -> None:
    """Say so where the last step of a checkpoint's ``state`` had another learning rate than it would have now."""
    last = state.get("last_step")
    if last is None:
        return
    if (now := learning_rate(run.schedule, run.tokens_at(last["step"] - 1))) != last["lr"]:
        message = "the learning rate jumps: that of step %d was %.6g, and would be %.6g by the schedule of this start"
        _log.warning(message, last["step"], last["lr"], now)


def side(run: Run, event: StepEvent, drawn: Mapping[str, Any]) -> Side:
    """What a report says of one step."""
    stage, layout = event.stage, run.layout
    shape = stage.shape_at(event.step - 1)
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "ep", "dp")}
    return {
        "stage": stage.name,
        "step": event.step,
        "tokens": event.tokens,
        "lr": event.lr,
        "loss": event.result.losses[0],
        "grad_norm": event.result.update.grad_norm,
        "seq_length": shape.seq_length,
        "tokens_per_step": shape.tokens_per_step,
        "lengths": _lengths(stage),
        "blend": {name: float(share) for name, share in blend_of(run.data, shape.blend).shares.items()},
        "drawn": {length: dict(by_source) for length, by_source in drawn.items()},
        "layout": " ".join(f"{name}{size}" for name, size in sizes.items()),
        "world_size": layout.world_size,
        "precision": run.precision.name,
    }


def _lengths(stage: Stage) -> str:
    """Each sequence length of a stage with its part of the steps."""
    counts: dict[int, int] = {}
    for shape, steps in stage.step_counts():
        counts[shape.seq_length] = counts.get(shape.seq_length, 0) + steps
    return ", ".join(f"{length:,} ({steps / stage.steps:.0%})" for length, steps in counts.items())


def write_report(path: Path, before: Side, after: Side) -> None:
    """Append a report; one of the same or a later step, from before a kill, is replaced."""
    drop_lines_after(path, after["step"] - 1)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": after["step"], "before": before, "after": after}) + "\n")


def report_table(before: Side, after: Side) -> Table:
    """A report for people; rows that differ are bold."""
    title = f"Stage {before['stage']} is done, {after['stage']} begins"
    table = Table(title=title, title_justify="left", title_style="bold")
    for name, width in (("", None), ("before", 44), ("after", 44)):
        table.add_column(name, max_width=width, overflow="fold")
    for name in after:
        was, now = _shown(before.get(name)), _shown(after[name])
        table.add_row(name.replace("_", " "), was, now, style="bold" if was != now else "dim")
    return table


def _shown(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
